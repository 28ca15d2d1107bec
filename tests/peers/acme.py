"""What the ACME tests share: requests, running issuers, and a CA with a DNS server."""

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
from csi_driver.authority.issuers.acme.config import AccountStorage, AcmeConfiguration, Dns01
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
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


def request_for(*names: str, key: PrivateKey | None = None) -> IssuerRequest:
    requested = Names.of([DNSName.parse(name) for name in names])
    granted = replace(requested, uris=(spiffe_id("cluster.local", "web", "edge"),))
    csr = parse_csr(build_csr(key or ec.generate_private_key(ec.SECP256R1()), requested))
    grant = Grant(granted, timedelta(days=1), (Usage.SERVER, Usage.CLIENT), ("policy[0]",))
    return IssuerRequest(csr, grant, POD, RequestedCertificate(requested))


@contextlib.asynccontextmanager
async def running_issuers(*issuers: AcmeIssuer) -> AsyncIterator[None]:
    """Run the issuers' background work; its failure fails the test."""
    tasks = [asyncio.ensure_future(issuer.run()) for issuer in issuers]
    try:
        yield
        for task in tasks:
            assert not task.done(), f"an issuer stopped working: {task.exception()!r}"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def issue_when_ready(issuer: AcmeIssuer, request: IssuerRequest) -> IssuedCertificate:
    """Retry the same request while it is pending, like a node."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await issuer.issue(request)
            except CertmountError as error:
                if error.reason is not Reason.ISSUANCE_PENDING:
                    raise
                await asyncio.sleep(0.2)


async def failure_of(issuer: AcmeIssuer, request: IssuerRequest) -> CertmountError:
    """Return the first error that says more than that the CA is working on the order."""
    async with asyncio.timeout(60):
        while True:
            try:
                issued = await issuer.issue(request)
            except CertmountError as error:
                if "when the CA finishes" not in str(error):
                    return error
            else:
                raise AssertionError(f"a certificate was issued for {dns_names(issued.chain)}")


def leaf(chain: tuple[bytes, ...]) -> x509.Certificate:
    return x509.load_der_x509_certificate(chain[0])


def dns_names(chain: tuple[bytes, ...]) -> set[str]:
    return {name.text for name in names_of(leaf(chain).extensions)}


@dataclass(frozen=True)
class AcmeEnvironment:
    """A CA, the DNS server that it queries, and a store."""

    directory: Path
    dns: Bind9
    ca: Pebble
    configuration: AcmeConfiguration

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(Path(self.configuration.account.directory), "acme.json")

    @property
    def roots_file(self) -> Path:
        assert self.configuration.roots_file is not None
        return Path(self.configuration.roots_file)

    def issuer(self, configuration: AcmeConfiguration | None = None, **options: Any) -> AcmeIssuer:
        return AcmeIssuer("letsencrypt", configuration or self.configuration, self.store, **options)


def dns_configuration(server: Bind9, **changes: Any) -> Dns01:
    default = Dns01(server.address, server.key_source, resolvers=(server.address,), nameservers=(server.address,))
    return replace(default, **changes)


@contextlib.asynccontextmanager
async def acme_environment(
    directory: Path, server: Bind9 | None = None, **pebble: Any
) -> AsyncIterator[AcmeEnvironment]:
    server = server or bind9(directory / "dns", {ZONE: ""})
    ca = Pebble(directory / "ca", server.address, **pebble)
    async with server.running(), ca.running():
        roots = directory / "roots.pem"
        roots.write_bytes(await ca.root_pem())
        yield AcmeEnvironment(
            directory,
            server,
            ca,
            AcmeConfiguration(
                AccountStorage(directory=str(directory / "store")),
                email="admin@example.test",
                directory=ca.directory_url,
                ca_file=ca.ca_file,
                terms_agreed=True,
                dns01=dns_configuration(server),
                roots_file=str(roots),
            ),
        )
