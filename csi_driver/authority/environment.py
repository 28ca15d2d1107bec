"""What differs between an authority in a cluster and an authority that uses a directory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csi_driver.authority.authn.token_review_cache import OfflineReviewer, TokenReviewer
from csi_driver.authority.config.watched_file import read_file
from csi_driver.authority.csr_api import CSRApi
from csi_driver.authority.diagnostics import DiagnosticCheck
from csi_driver.authority.events.recorder import EventRecorder, NullEventRecorder
from csi_driver.authority.issuers.dependencies import CredentialReader, IssuerDependencies
from csi_driver.authority.pod_certificates.api import PodCertificateApi
from csi_driver.authority.policy.subjects import OfflineSubjectLookup, PolicySubjectLookup
from csi_driver.authority.storage import DirectoryStore, Store
from csi_driver.authority.trust.acknowledgements import ACKNOWLEDGEMENTS_FILE, ConnectedNodes, NodeList
from csi_driver.authority.trust.bundles import DirectoryPublisher, RootPublisher, TrustBundles
from csi_driver.core.cluster.objects import PublishedKeys
from csi_driver.core.errors import Reason

_MAX_BYTES = 1024 * 1024


async def _no_background_work() -> None: ...


@dataclass(frozen=True, slots=True)
class Environment:
    """Services that the authority uses. The defaults are for an authority without a cluster."""

    ca_store: Store
    acknowledgement_store: Store
    publisher: RootPublisher
    fetch_keys: Callable[[], Awaitable[PublishedKeys]]
    reviewer: TokenReviewer
    subjects: PolicySubjectLookup = OfflineSubjectLookup()
    events: EventRecorder = NullEventRecorder()
    nodes: Callable[[TrustBundles], NodeList] = ConnectedNodes
    issuer_dependencies: IssuerDependencies = IssuerDependencies(CredentialReader())
    checks: Sequence[DiagnosticCheck] = ()  # for --check
    run: Callable[[], Coroutine[Any, Any, None]] = _no_background_work
    """Runs the watches and writes events while the authority runs."""
    outdated: Callable[[], Sequence[str]] = tuple
    """Returns why the caches of the watches must not be used now, or nothing."""
    csr_api: CSRApi | None = None
    pod_certificate_api: PodCertificateApi | None = None


def directory_environment(ca_dir: Path, jwks: Path, token_issuer: str) -> Environment:
    """Return an environment without a cluster: the CA is in ``ca_dir``, and the file ``jwks`` has the token keys."""

    async def fetch_keys() -> PublishedKeys:
        content = await asyncio.to_thread(read_file, jwks, _MAX_BYTES, Reason.TOKEN_REVIEW_UNAVAILABLE, "see --jwks")
        return PublishedKeys(token_issuer, content)

    acknowledgements = DirectoryStore(ca_dir, ACKNOWLEDGEMENTS_FILE)
    return Environment(
        DirectoryStore(ca_dir), acknowledgements, DirectoryPublisher(ca_dir), fetch_keys, OfflineReviewer()
    )
