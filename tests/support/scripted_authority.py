"""An authority for tests of the node: a real TLS gRPC server and a real CA, whose behaviour a test scripts.

It believes every token, so it proves nothing about admission; that is tested against the real authority.
Run as a program (for benchmarks, so that its work is not the driver's):

    python -m tests.support.scripted_authority DIR [--delay-ms 20]

writes DIR/root.crt and DIR/address, and serves until standard input closes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import grpc
import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.core.certificates.csr import parse_csr, san_extension
from csi_driver.core.certificates.keys import PublicKey, public_bytes
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.rpc.server import Interceptor

TRUST_DOMAIN = "cluster.local"


class TestCA:
    """A root that signs leaves directly."""

    __test__ = False

    def __init__(self, name: str = "test root", life: timedelta = timedelta(days=1)) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder(subject, subject, self.key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    def sign(self, key: PublicKey, names: Names, life: timedelta, *, ca: bool = False) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder(self.certificate.subject, x509.Name([]), key, x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + life)
            .add_extension(san_extension(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self.key, SHA256())
        )


Response = authority_pb2.IssueResponse


def answer_of(chain: Sequence[bytes], roots: Sequence[bytes], generation: int = 0) -> Response:
    """An answer with a chain and the internal issuer's roots (X.509 DER)."""
    return Response(chain=chain, trust={DEFAULT_ISSUER: authority_pb2.RootSet(roots=roots, generation=generation)})


def roots_of(answer: Response) -> Sequence[bytes]:
    """The internal issuer's roots in an answer."""
    return answer.trust[DEFAULT_ISSUER].roots


@dataclass
class Script:
    """What the authority does next; a test changes it at any time."""

    delay_s: float = 0.0
    gate: asyncio.Event | None = None
    """Where there is one, requests wait until it is set."""
    gate_outside: asyncio.Event | None = None
    """The same for requests to issuers outside only."""
    life: timedelta = timedelta(hours=1)
    """For requests that name none."""
    failure: CertmountError | None = None
    renew_after: timedelta | None = None
    """The hint to renew; short ones let a test see rotations soon."""
    tamper: Callable[[Response], Response] = lambda response: response
    calls: int = 0
    """Requests to issue that arrived, whatever became of them."""
    tokens: list[str] = field(default_factory=list)
    """The pod token of each of them."""
    csrs: list[bytes] = field(default_factory=list)
    """The request of each of them."""
    issued: list[Names] = field(default_factory=list)
    """The names of every certificate that was signed."""
    finished: bool = True
    """While false, issuers outside keep their orders open, and the answer is that they are pending."""
    stand_in: timedelta | None = None
    """Where there is one, pods get a certificate of the internal CA meanwhile, and are to ask again after so long."""
    orders: dict[bytes, Names] = field(default_factory=dict)
    """What issuers outside were asked to sign, by the key: who asks again with a key asks for the same order."""


class ScriptedAuthority(authority_pb2_grpc.AuthorityServicer):
    """Serves on a free port of loopback; ``address``, ``root_file`` and ``token_file`` are what the node needs to call it."""

    def __init__(self, folder: Path, script: Script | None = None) -> None:
        self.ca = TestCA()
        self.script = script or Script()
        self.root_file = folder / "root.crt"
        self.token_file = folder / "node-token"
        self.address = ""
        self.watchers = 0
        """Nodes that watch the roots now."""
        self.confirmed: list[tuple[str, int]] = []
        """Sets and generations that nodes confirmed."""
        self.confirm_gate: asyncio.Event | None = None
        """Where there is one, confirmations wait until it is set."""
        self.reports: list[authority_pb2.ReportRequest] = []
        self.sets: dict[str, RootSet] = {DEFAULT_ISSUER: RootSet((self.ca.der,), 1)}
        """What is to be trusted now; :meth:`tell` sends it to those who watch."""
        self.policy = "first"
        self.outside: dict[str, TestCA] = {}
        """Issuers beside the internal CA; they sign the names in the CSR, and no SPIFFE ID, as public CAs do."""
        self.sharing: tuple[str, ...] = ()
        self.due: tuple[str, ...] = ()
        """Digests of the keys whose certificates are to be renewed now."""
        """Those of them whose certificates pods are to share."""
        self._told = 0
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self.root_file.write_bytes(self.ca.pem)
        self.token_file.write_text("test-node-token")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.ca.sign(key.public_key(), Names.of([DNSName.parse("localhost")]), timedelta(hours=12))
        pem_key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        credentials = grpc.ssl_server_credentials([(pem_key, certificate.public_bytes(Encoding.PEM))])
        self._server = grpc.aio.server(interceptors=[Interceptor(lambda _: None)])
        authority_pb2_grpc.add_AuthorityServicer_to_server(self, self._server)
        port = int(self.address.rpartition(":")[2] or 0)
        bound = self._server.add_secure_port(f"127.0.0.1:{port}", credentials)
        self.address = f"localhost:{bound}"
        await self._server.start()

    async def stop(self) -> None:
        """Ends at once; ``start`` serves again at the same port with the same CA."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    @property
    def serving(self) -> bool:
        return self._server is not None

    async def trust(self, *roots: bytes, name: str = DEFAULT_ISSUER) -> None:
        """Gives a set other roots (DER), and sends them to everyone who watches."""
        before = self.sets.get(name)
        self.sets[name] = RootSet(roots, before.generation + 1 if before else 1)
        await self.tell()

    async def open_issuer(self, name: str, *, sharing: bool) -> TestCA:
        """Has an issuer outside from now on; nodes confirm its roots when they know it."""
        self.outside[name] = TestCA(f"root of {name}")
        if sharing:
            self.sharing = (*self.sharing, name)
        await self.trust(self.outside[name].der, name=name)
        return self.outside[name]

    async def tell(self) -> None:
        """Sends what there is now to everyone who watches."""
        async with self._changed:
            self._told += 1
            self._changed.notify_all()

    def confirmed_of(self, name: str = DEFAULT_ISSUER) -> int:
        """The newest generation of a set that was confirmed; 0 for none."""
        return max((generation for confirmed, generation in self.confirmed if confirmed == name), default=0)

    async def Issue(self, request: authority_pb2.IssueRequest, _context: Any) -> Response:  # noqa: N802
        script = self.script
        script.calls += 1
        script.tokens.append(request.pod_token)
        script.csrs.append(request.csr)
        if script.delay_s:
            await asyncio.sleep(script.delay_s)  # the issuer's own time, by the test's script
        if script.gate is not None:
            await script.gate.wait()
        if script.failure is not None:
            raise script.failure
        if request.issuer in self.outside:
            if script.gate_outside is not None:
                await script.gate_outside.wait()
            return script.tamper(self._ordered(request))
        return script.tamper(self._signed(request, request.issuer))

    def _signed(self, request: authority_pb2.IssueRequest, *names_of_sets: str) -> Response:
        """What the internal CA signs."""
        script, csr = self.script, parse_csr(request.csr)
        claims = jwt.decode(request.pod_token, options={"verify_signature": False})["kubernetes.io"]
        own = spiffe_id(TRUST_DOMAIN, claims["namespace"], claims["serviceaccount"]["name"])
        names = Names.of(csr.names.dns, (own, *csr.names.uris))
        life = request.duration.ToTimedelta() if request.HasField("duration") else script.life
        return self._answer(self.ca, csr.public_key, names, life, [*names_of_sets, *request.federations])

    def _ordered(self, request: authority_pb2.IssueRequest) -> Response:
        """What an issuer outside makes of a request."""
        script, csr = self.script, parse_csr(request.csr)
        script.orders[public_bytes(csr.public_key)] = csr.names
        if script.finished:
            sets = [request.issuer, *request.federations]
            return self._answer(self.outside[request.issuer], csr.public_key, csr.names, script.life, sets)
        if script.stand_in is None:
            raise CertmountError(Reason.ISSUANCE_PENDING, "the CA is at it")
        response = self._signed(request, DEFAULT_ISSUER, request.issuer)
        response.interim = True
        response.renew_after.FromTimedelta(script.stand_in)
        return response

    def _answer(self, ca: TestCA, key: PublicKey, names: Names, life: timedelta, sets: Sequence[str]) -> Response:
        leaf = ca.sign(key, names, life)
        self.script.issued.append(names)
        trust = self._wire(
            {name: self.sets[name] for name in (each or DEFAULT_ISSUER for each in sets) if name in self.sets}
        )
        response = Response(chain=[leaf.public_bytes(Encoding.DER)], trust=trust)
        if self.script.renew_after is not None:
            response.renew_after.FromTimedelta(self.script.renew_after)
        return response

    async def ConfirmTrust(self, request: authority_pb2.ConfirmTrustRequest, _context: Any) -> Any:  # noqa: N802
        if self.confirm_gate is not None:
            await self.confirm_gate.wait()
        self.confirmed.append((request.set, request.generation))
        return authority_pb2.ConfirmTrustResponse()

    async def Report(self, request: authority_pb2.ReportRequest, _context: Any) -> Any:  # noqa: N802
        self.reports.append(request)
        return authority_pb2.ReportResponse()

    async def WatchTrust(self, _request: object, _context: Any) -> AsyncIterator[authority_pb2.TrustBundle]:  # noqa: N802
        self.watchers += 1
        try:
            while True:
                told = self._told
                yield authority_pb2.TrustBundle(
                    sets=self._wire(self.sets),
                    policy_revision=self.policy,
                    shared_issuers=self.sharing,
                    renew_now=self.due,
                )
                async with self._changed:
                    await self._changed.wait_for(lambda told=told: self._told != told)  # type: ignore[misc]
        finally:
            self.watchers -= 1

    @staticmethod
    def _wire(sets: Mapping[str, RootSet]) -> dict[str, authority_pb2.RootSet]:
        return {
            name: authority_pb2.RootSet(roots=each.roots, generation=each.generation) for name, each in sets.items()
        }


def refused(name: str) -> CertmountError:
    """What the real authority answers for a name that no rule allows."""
    return CertmountError(Reason.NAME_NOT_ALLOWED, f"{name}: no policy rule allows this name")


async def _serve(folder: Path, delay_ms: float) -> None:
    async with ScriptedAuthority(folder, Script(delay_s=delay_ms / 1000)) as authority:
        (folder / "address").write_text(authority.address)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.folder, arguments.delay_ms))
