"""An authority for tests of the node: a TLS gRPC server and a CA, controlled by a script. It accepts every token."""

from __future__ import annotations

import asyncio
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
from csi_driver.authority.service import MAX_MESSAGE_BYTES
from csi_driver.core.certificates.csr import parse_csr, san_extension
from csi_driver.core.certificates.keys import PublicKey, public_bytes
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.rpc.issue_stream_server import IssueStreamServer
from csi_driver.rpc.server import CallRecorder, Interceptor

TRUST_DOMAIN = "cluster.local"


class TestCA:
    """A root that signs leaf certificates."""

    __test__ = False

    def __init__(self, name: str = "test root", lifetime: timedelta = timedelta(days=1)) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ahead = timedelta()  # of the CA's clock
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder(subject, subject, self.key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    def sign(self, key: PublicKey, names: Names, lifetime: timedelta, *, ca: bool = False) -> x509.Certificate:
        now = datetime.now(UTC) + self.ahead
        return (
            x509.CertificateBuilder(self.certificate.subject, x509.Name([]), key, x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + lifetime)
            .add_extension(san_extension(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self.key, SHA256())
        )


Response = authority_pb2.IssueResponse


def response_of(chain: Sequence[bytes], roots: Sequence[bytes], generation: int = 0) -> Response:
    return Response(chain=chain, trust={DEFAULT_ISSUER: authority_pb2.RootSet(roots=roots, generation=generation)})


def roots_of(response: Response) -> Sequence[bytes]:
    return response.trust[DEFAULT_ISSUER].roots


@dataclass
class Script:
    """What the authority does. Tests can change it at any time."""

    delay_s: float = 0.0
    gate: asyncio.Event | None = None  # if not None, requests wait for it
    external_gate: asyncio.Event | None = None  # if not None, requests to external issuers wait for it
    lifetime: timedelta = timedelta(hours=1)  # without a requested duration
    failure: CertmountError | None = None
    renew_after: timedelta | None = None  # a short time causes an early renewal
    tamper: Callable[[Response], Response] = lambda response: response
    check_failure: CertmountError | None = None
    checks: list[tuple[str, str]] = field(default_factory=list)  # the pod token and the key type of each check
    calls: int = 0  # all issuance requests
    tokens: list[str] = field(default_factory=list)  # the pod token of each request
    csrs: list[bytes] = field(default_factory=list)  # the CSR of each request
    issued: list[Names] = field(default_factory=list)  # the names of each signed certificate
    finished: bool = True  # if false, requests to external issuers stay pending
    interim_renew_after: timedelta | None = None
    """If not None, pending requests get an interim certificate to renew after this time."""
    orders: dict[bytes, Names] = field(default_factory=dict)
    """The names of each request to an external issuer, by public key."""


class _Versions(grpc.aio.ServerInterceptor):
    """Hides IssueStream from callers if the authority has an older version."""

    def __init__(self, authority: ScriptedAuthority) -> None:
        self._authority = authority

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method.rpartition("/")[2]
        if method.startswith("Issue"):
            self._authority.methods.append(method)
        if method == "IssueStream" and not self._authority.knows_streams:
            return None
        return await continuation(handler_call_details)


class ScriptedAuthority(authority_pb2_grpc.AuthorityServicer):
    """Serves on a free loopback port. The node needs ``address``, ``root_file`` and ``token_file``."""

    def __init__(self, directory: Path, script: Script | None = None) -> None:
        self.ca = TestCA()
        self.script = script or Script()
        self.root_file = directory / "root.crt"
        self.token_file = directory / "node-token"
        self.address = ""
        self.watchers = 0  # the number of open trust streams
        self.acknowledged: list[tuple[str, int]] = []  # sets and generations
        self.acknowledgement_gate: asyncio.Event | None = None  # if not None, acknowledgements wait for it
        self.reports: list[authority_pb2.ReportRequest] = []
        self.sets: dict[str, RootSet] = {DEFAULT_ISSUER: RootSet((self.ca.der,), 1)}
        """The current root sets. :meth:`send_bundle` sends them."""
        self.policy = "first"
        self.knows_streams = True  # False: as an authority of a version before IssueStream
        self.methods: list[str] = []  # the issuance methods that were called
        self.external_issuers: dict[str, TestCA] = {}
        """They sign only the names of the CSR and no SPIFFE ID, like public CAs."""
        self.shared_issuers: tuple[str, ...] = ()
        self.renew_now: tuple[str, ...] = ()  # fingerprints of keys whose certificates need an early renewal
        self.replace_keys: tuple[str, ...] = ()  # those of them that get no other certificate
        self._version = 0
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self._streams: IssueStreamServer

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
        recorder = CallRecorder(lambda _: None)
        self._streams = IssueStreamServer(recorder)
        options = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),)
        self._server = grpc.aio.server(interceptors=[_Versions(self), Interceptor(recorder)], options=options)
        authority_pb2_grpc.add_AuthorityServicer_to_server(self, self._server)
        port = int(self.address.rpartition(":")[2] or 0)
        bound = self._server.add_secure_port(f"127.0.0.1:{port}", credentials)
        self.address = f"localhost:{bound}"
        await self._server.start()

    async def stop(self) -> None:
        """Stop immediately. ``start`` serves again on the same port with the same CA."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    @property
    def serving(self) -> bool:
        return self._server is not None

    def drain(self) -> None:
        """Ask nodes to open new streams, once."""
        self._streams.close()
        self._streams = IssueStreamServer(CallRecorder(lambda _: None))

    async def trust(self, *roots: bytes, name: str = DEFAULT_ISSUER) -> None:
        before = self.sets.get(name)
        self.sets[name] = RootSet(roots, before.generation + 1 if before else 1)
        await self.send_bundle()

    async def add_external_issuer(self, name: str, *, shared: bool) -> TestCA:
        self.external_issuers[name] = TestCA(f"root of {name}")
        if shared:
            self.shared_issuers = (*self.shared_issuers, name)
        await self.trust(self.external_issuers[name].der, name=name)
        return self.external_issuers[name]

    async def send_bundle(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    def acknowledged_generation(self, name: str = DEFAULT_ISSUER) -> int:
        """Return the newest acknowledged generation of a set, or 0."""
        return max((generation for acknowledged, generation in self.acknowledged if acknowledged == name), default=0)

    async def Issue(self, request: authority_pb2.IssueRequest, _context: Any) -> Response:  # noqa: N802
        script = self.script
        script.calls += 1
        script.tokens.append(request.pod_token)
        script.csrs.append(request.csr)
        if script.delay_s:
            await asyncio.sleep(script.delay_s)
        if script.gate is not None:
            await script.gate.wait()
        if script.failure is not None:
            raise script.failure
        if request.issuer in self.external_issuers:
            if script.external_gate is not None:
                await script.external_gate.wait()
            return script.tamper(self._sign_external(request))
        return script.tamper(self._sign_internal(request, request.issuer))

    async def IssueStream(self, _requests: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await self._streams.serve(context, lambda request: self.Issue(request, context))

    async def Check(self, request: authority_pb2.CheckRequest, _context: Any) -> authority_pb2.CheckResponse:  # noqa: N802
        self.script.checks.append((request.request.pod_token, request.key_type))
        if self.script.check_failure is not None:
            raise self.script.check_failure
        return authority_pb2.CheckResponse()

    def _sign_internal(self, request: authority_pb2.IssueRequest, *names_of_sets: str) -> Response:
        script, csr = self.script, parse_csr(request.csr)
        claims = jwt.decode(request.pod_token, options={"verify_signature": False})["kubernetes.io"]
        own = spiffe_id(TRUST_DOMAIN, claims["namespace"], claims["serviceaccount"]["name"])
        uris = csr.names.uris if request.without_spiffe_id else (own, *csr.names.uris)
        names = Names.of(csr.names.dns, uris, csr.names.ips, csr.names.emails)
        lifetime = request.duration.ToTimedelta() if request.HasField("duration") else script.lifetime
        return self._response(self.ca, csr.public_key, names, lifetime, [*names_of_sets, *request.federations])

    def _sign_external(self, request: authority_pb2.IssueRequest) -> Response:
        script, csr = self.script, parse_csr(request.csr)
        script.orders[public_bytes(csr.public_key)] = csr.names
        if script.finished:
            ca, sets = self.external_issuers[request.issuer], [request.issuer, *request.federations]
            return self._response(ca, csr.public_key, csr.names, script.lifetime, sets)
        if script.interim_renew_after is None:
            raise CertmountError(Reason.ISSUANCE_PENDING, "the CA has not issued the certificate yet")
        response = self._sign_internal(request, DEFAULT_ISSUER, request.issuer)
        response.interim = True
        response.renew_after.FromTimedelta(script.interim_renew_after)
        return response

    def _response(self, ca: TestCA, key: PublicKey, names: Names, lifetime: timedelta, sets: Sequence[str]) -> Response:
        leaf = ca.sign(key, names, lifetime)
        self.script.issued.append(names)
        known = {name: self.sets[name] for name in (each or DEFAULT_ISSUER for each in sets) if name in self.sets}
        response = Response(chain=[leaf.public_bytes(Encoding.DER)], trust=self._wire(known))
        if self.script.renew_after is not None:
            response.renew_after.FromTimedelta(self.script.renew_after)
        return response

    async def ConfirmTrust(self, request: authority_pb2.ConfirmTrustRequest, _context: Any) -> Any:  # noqa: N802
        if self.acknowledgement_gate is not None:
            await self.acknowledgement_gate.wait()
        self.acknowledged.append((request.set, request.generation))
        return authority_pb2.ConfirmTrustResponse()

    async def Report(self, request: authority_pb2.ReportRequest, _context: Any) -> Any:  # noqa: N802
        self.reports.append(request)
        return authority_pb2.ReportResponse()

    async def WatchTrust(self, _request: object, _context: Any) -> AsyncIterator[authority_pb2.TrustBundle]:  # noqa: N802
        self.watchers += 1
        try:
            while True:
                version = self._version
                yield authority_pb2.TrustBundle(
                    sets=self._wire(self.sets),
                    policy_revision=self.policy,
                    shared_issuers=self.shared_issuers,
                    renew_now=self.renew_now,
                    replace_keys=self.replace_keys,
                    environments=dict.fromkeys((DEFAULT_ISSUER, *self.external_issuers), "test"),
                )
                async with self._changed:
                    await self._changed.wait_for(lambda version=version: self._version != version)  # type: ignore[misc]
        finally:
            self.watchers -= 1

    @staticmethod
    def _wire(sets: Mapping[str, RootSet]) -> dict[str, authority_pb2.RootSet]:
        return {name: authority_pb2.RootSet(roots=one.roots, generation=one.generation) for name, one in sets.items()}


def name_not_allowed(name: str) -> CertmountError:
    return CertmountError(Reason.NAME_NOT_ALLOWED, f"{name}: no policy rule allows this name")
