"""What the ACME tests share: requests, running issuers, and a CA with a DNS server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.issuers.acme.config import AccountStorage, AcmeConfiguration, Dns01
from csi_driver.authority.issuers.acme.http01 import ChallengeServer
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.certificates.csr import build_csr, names_of, parse_csr
from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.spec import Usage
from tests.peers.bind9 import Bind9
from tests.peers.pebble import Pebble
from tests.peers.processes import LOOPBACK
from tests.support.waiting import in_background

POD = PodIdentity(ServiceAccount("web", "edge"), "uid-1", "edge-0", "uid-2", "node-a", "uid-3", 2e9)
ZONE = "example.test"


def request_for(*names: str, key: PrivateKey | None = None) -> IssuerRequest:
    requested = Names.of([DNSName.parse(name) for name in names])
    granted = replace(requested, uris=(spiffe_id("cluster.local", "web", "edge"),))
    csr = parse_csr(build_csr(key or ec.generate_private_key(ec.SECP256R1()), requested))
    grant = Grant(granted, timedelta(days=1), (Usage.SERVER, Usage.CLIENT), ("policy[0]",))
    return IssuerRequest(csr, grant, POD, RequestedCertificate(requested))


def running_issuers(*issuers: Issuer) -> AbstractAsyncContextManager[None]:
    return in_background(*(issuer.run() for issuer in issuers))


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


@contextlib.asynccontextmanager
async def challenge_server(*issuers: Issuer, port: int = 0) -> AsyncIterator[int]:
    server = ChallengeServer(f"{LOOPBACK}:{port}", lambda: issuers)
    try:
        yield await server.start()
    finally:
        await server.stop()


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

    def with_dns01(self, **changes: Any) -> AcmeConfiguration:
        assert self.configuration.dns01 is not None
        return replace(self.configuration, dns01=replace(self.configuration.dns01, **changes))

    def declaration(self) -> dict[str, Any]:
        """Return the entry for the issuers file."""
        configuration, dns = self.configuration, self.dns
        servers = {"resolvers": [dns.address], "nameservers": [dns.address]}
        return {
            "account": {"directory": configuration.account.directory}, "directory": configuration.directory,
            "terms_agreed": True, "ca": {"file": configuration.ca_file}, "roots": {"file": configuration.roots_file},
            "dns01": {"server": dns.address, "tsig": {"file": dns.key_source.path}, **servers},
        }  # fmt: skip

    def issuer(self, configuration: AcmeConfiguration | None = None, **options: Any) -> AcmeIssuer:
        return AcmeIssuer("letsencrypt", configuration or self.configuration, self.store, **options)

    async def issue(self, *names: str, configuration: AcmeConfiguration | None = None) -> IssuedCertificate:
        """Issue a certificate for exactly these names, with an issuer that runs meanwhile."""
        issuer = self.issuer(configuration)
        async with running_issuers(issuer):
            issued = await issue_when_ready(issuer, request_for(*names))
        assert dns_names(issued.chain) == set(names)
        return issued

    async def failure(
        self, *names: str, configuration: AcmeConfiguration | None = None, wait_s: float = 2.0
    ) -> CertmountError:
        issuer = self.issuer(configuration, wait_s=wait_s)
        async with running_issuers(issuer):
            return await failure_of(issuer, request_for(*names))


def dns_configuration(server: Bind9, **changes: Any) -> Dns01:
    default = Dns01(server.address, server.key_source, resolvers=(server.address,), nameservers=(server.address,))
    return replace(default, **changes)


@contextlib.asynccontextmanager
async def acme_environment(
    directory: Path, server: Bind9 | None = None, resolver: Bind9 | None = None, **pebble: Any
) -> AsyncIterator[AcmeEnvironment]:
    """``resolver`` is what the CA and the authority query, if it is not the server itself. The caller runs it."""
    server = server or Bind9(directory / "dns", {ZONE: ""})
    ca = Pebble(directory / "ca", (resolver or server).address, **pebble)
    async with server.running(), ca.running():
        roots = directory / "roots.pem"
        roots.write_bytes(await ca.root_pem())
        account = AccountStorage(directory=str(directory / "store"))
        configuration = AcmeConfiguration(
            account, email="admin@example.test", directory=ca.directory_url, ca_file=ca.ca_file, terms_agreed=True,
            dns01=dns_configuration(server), roots_file=str(roots),
        )  # fmt: skip
        yield AcmeEnvironment(directory, server, ca, configuration)
