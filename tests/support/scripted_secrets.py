"""An authority for tests of the Secrets controller: signs with test CAs, or fails as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta

from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.certificates.csr import parse_csr
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.rpc.authority_messages import IssuanceResponse, TrustBundle
from csi_driver.secrets.requests import DesiredSecret
from tests.support.scripted_authority import TestCA


class ScriptedSecretsAuthority:
    """Implements the protocols of the controller without a network."""

    def __init__(self) -> None:
        self.cas = {
            DEFAULT_ISSUER: TestCA("internal", timedelta(days=3650)),
            "letsencrypt": TestCA("le", timedelta(days=3650)),
        }
        self.environments = {DEFAULT_ISSUER: "internal", "letsencrypt": "https://staging.example/directory"}
        self.lifetime = timedelta(days=90)
        self.failure: Callable[[DesiredSecret], CertmountError | None] = lambda _: None
        self.requests: list[DesiredSecret] = []
        self.csrs: list[bytes] = []
        self.renew_now: frozenset[str] = frozenset()
        self.more_roots: dict[str, tuple[bytes, ...]] = {}
        self.policy_revision = "1"
        self.gate: asyncio.Event | None = None
        self._changed = asyncio.Event()

    @property
    def bundle(self) -> TrustBundle:
        sets = {name: RootSet((ca.der, *self.more_roots.get(name, ())), 1) for name, ca in self.cas.items()}
        return TrustBundle(
            sets, self.policy_revision, frozenset(), self.renew_now, environments=dict(self.environments)
        )

    def send_bundle(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        while True:
            changed = self._changed
            yield self.bundle
            await changed.wait()

    async def issue(self, csr: bytes, desired: DesiredSecret) -> IssuanceResponse:
        self.requests.append(desired)
        self.csrs.append(csr)
        if self.gate is not None:
            await self.gate.wait()
        if (failure := self.failure(desired)) is not None:
            raise failure
        signer = desired.options.issuer
        parsed = parse_csr(csr)
        leaf = self.cas[signer].sign(parsed.public_key, parsed.names, desired.options.duration or self.lifetime)
        return IssuanceResponse([leaf.public_bytes(Encoding.DER)], self.bundle.sets, None)
