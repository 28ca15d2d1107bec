"""What the ACME tests share: orders as the desk hands them in, issuers at work, and a CA beside a DNS server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.acme.settings import AcmeSettings, Dns01, StorePlace
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.certificates.csr import build_csr, names_of, parse_csr
from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.spec import Usage
from tests.peers.bind9 import Bind9, bind9
from tests.peers.pebble import Pebble

POD = PodIdentity(ServiceAccount("web", "edge"), "uid-1", "edge-0", "uid-2", "node-a", "uid-3", 2e9)
ZONE = "example.test"


def order_for(*names: str, key: PrivateKey | None = None) -> IssuerRequest:
    """As the desk hands it in for a pod that asks for these DNS names; a new key where none is given."""
    asked = Names.of([DNSName.parse(name) for name in names])
    granted = replace(asked, uris=(spiffe_id("cluster.local", "web", "edge"),))
    request = parse_csr(build_csr(key or ec.generate_private_key(ec.SECP256R1()), asked))
    grant = Grant(granted, timedelta(days=1), (Usage.SERVER, Usage.CLIENT), ("policy[0]",))
    return IssuerRequest(request, grant, POD, RequestedCertificate(asked))


@contextlib.asynccontextmanager
async def at_work(*issuers: AcmeIssuer) -> AsyncIterator[None]:
    """While the issuers' background work runs; a failure of it fails the test."""
    tasks = [asyncio.ensure_future(issuer.run()) for issuer in issuers]
    try:
        yield
        for task in tasks:
            assert not task.done(), f"an issuer stopped working: {task.exception()!r}"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def patiently(issuer: AcmeIssuer, order: IssuerRequest) -> IssuedCertificate:
    """As a node asks: again with the same request, for as long as the answer is that it is pending."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await issuer.issue(order)
            except CertmountError as error:
                if error.reason is not Reason.ISSUANCE_PENDING:
                    raise
                await asyncio.sleep(0.2)


async def told(issuer: AcmeIssuer, order: IssuerRequest) -> CertmountError:
    """What a pod hears that gets no certificate: the first answer that says more than that the CA is at it."""
    async with asyncio.timeout(60):
        while True:
            try:
                issued = await issuer.issue(order)
            except CertmountError as error:
                if "the CA is at it" not in str(error):
                    return error
            else:
                raise AssertionError(f"a certificate was issued for {dns_names(issued.chain)}")


def leaf(chain: tuple[bytes, ...]) -> x509.Certificate:
    return x509.load_der_x509_certificate(chain[0])


def dns_names(chain: tuple[bytes, ...]) -> set[str]:
    return {name.text for name in names_of(leaf(chain).extensions)}


@dataclass(frozen=True)
class Site:
    """A CA and a DNS server that know each other, and a store."""

    folder: Path
    dns: Bind9
    ca: Pebble
    settings: AcmeSettings

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(Path(self.settings.account.folder), "acme.json")

    @property
    def roots_file(self) -> Path:
        """What pods are to trust, by the settings."""
        assert self.settings.roots_file is not None
        return Path(self.settings.roots_file)

    def issuer(self, settings: AcmeSettings | None = None, **options: Any) -> AcmeIssuer:
        return AcmeIssuer("letsencrypt", settings or self.settings, self.store, **options)


def dns_settings(server: Bind9, **changes: Any) -> Dns01:
    """All questions go to one server of the test."""
    return replace(
        Dns01(server.address, server.key_source, resolvers=(server.address,), nameservers=(server.address,)), **changes
    )


@contextlib.asynccontextmanager
async def site(folder: Path, server: Bind9 | None = None, **pebble: Any) -> AsyncIterator[Site]:
    """Running, with zone ``example.test``."""
    server = server or bind9(folder / "dns", {ZONE: ""})
    ca = Pebble(folder / "ca", server.address, **pebble)
    async with server.running(), ca.running():
        roots = folder / "roots.pem"
        roots.write_bytes(await ca.root_pem())
        yield Site(
            folder,
            server,
            ca,
            AcmeSettings(
                StorePlace(folder=str(folder / "store")),
                email="admin@example.test",
                directory=ca.directory,
                ca_file=ca.ca_file,
                terms_agreed=True,
                dns01=dns_settings(server),
                roots_file=str(roots),
            ),
        )
