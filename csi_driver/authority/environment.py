"""Where an authority stands: what keeps its CA, where its root is published, and who vouches for tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csi_driver.authority.authn.token_reviews import OfflineReviewer, TokenReviewer
from csi_driver.authority.csr_api import CSRApi
from csi_driver.authority.diagnostics import Check
from csi_driver.authority.events.recorder import NoEvents
from csi_driver.authority.issuance.pipeline import EventRecorder, SubjectLookup
from csi_driver.authority.issuers.kinds import IssuerDependencies
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.policy.subjects import NoCluster
from csi_driver.authority.storage import DirectoryStore, Store
from csi_driver.authority.trust.acknowledgements import ACKNOWLEDGEMENTS_FILE, ConnectedNodes, NodeList
from csi_driver.authority.trust.bundles import DirectoryPublisher, RootPublisher, TrustBundles
from csi_driver.core.cluster.token_review import PublishedKeys
from csi_driver.core.errors import CertmountError, Fault, Reason

_MAX_BYTES = 1024 * 1024


async def _nothing() -> None:
    """There is nothing to follow."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What differs between a cluster and a folder; nothing else of the authority does."""

    store: Store
    """Of the CA."""
    confirmations: Store
    """Of what nodes say they trust."""
    publisher: RootPublisher
    fetch_keys: Callable[[], Awaitable[PublishedKeys]]
    reviewer: TokenReviewer
    subjects: SubjectLookup = NoCluster()
    events: EventRecorder = NoEvents()
    nodes: Callable[[TrustBundles], NodeList] = ConnectedNodes
    tools: IssuerDependencies = IssuerDependencies(CredentialReader())
    """What issuers are made with; outside of a cluster all they need is in files."""
    checks: Sequence[Check] = ()
    """What ``--check`` is to look at here."""
    run: Callable[[], Coroutine[Any, Any, None]] = _nothing
    """Keeps what is known of the cluster up to date, for as long as the authority lives."""
    outdated: Callable[[], Sequence[str]] = tuple
    """Why what is known of the cluster can't be believed now, in words."""
    csrs: CSRApi | None = None
    """The cluster's CertificateSigningRequests; None outside of one."""


def outside_a_cluster(ca_dir: Path, jwks: Path, token_issuer: str) -> Environment:
    """The CA and its root in ``ca_dir``; tokens by the key set in the file ``jwks`` only."""

    def read() -> PublishedKeys:
        try:
            with jwks.open("rb") as file:
                return PublishedKeys(token_issuer, file.read(_MAX_BYTES))
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault(str(jwks), problem, "see --jwks")) from None

    async def fetch() -> PublishedKeys:
        return await asyncio.to_thread(read)

    return Environment(
        DirectoryStore(ca_dir),
        DirectoryStore(ca_dir, ACKNOWLEDGEMENTS_FILE),
        DirectoryPublisher(ca_dir),
        fetch,
        OfflineReviewer(),
    )
