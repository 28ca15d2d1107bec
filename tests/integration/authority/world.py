"""An authority on the loopback interface, with a token issuer and a reviewer that tests control, and a client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from prometheus_client import CollectorRegistry

from csi_driver import NODE_AUDIENCE, SECRETS_AUDIENCE
from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.environment import Environment
from csi_driver.authority.server import AuthorityServer, AuthoritySettings
from csi_driver.authority.storage import DirectoryStore
from csi_driver.authority.trust.bundles import DirectoryPublisher
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.cluster.objects import PublishedKeys, ReviewedToken
from csi_driver.core.errors import REASONS, CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.rpc.errors import REASON_KEY
from csi_driver.rpc.issue_stream_client import STREAM_LOST, IssueStream
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.call_failures import CallFailure, failure_of
from tests.support.tokens import CONTROLLER, DRIVER, Pod, TokenIssuer
from tests.support.waiting import until

__all__ = ["CallFailure", "failure_of"]
SERVING_NAME = "certmount-authority.certmount.svc"
POLICY = """
policy:
- match: {namespaces: [default], serviceAccounts: [hello]}
  allow: {dns: ["*.{namespace}.svc.{cluster_domain}"], uris: ["spiffe://{trust_domain}/extra/*"], subjects: ["O=Example"],
    without_spiffe_id: true}
"""
POD = Pod()
Metadata = Sequence[tuple[str, str]]
NAME = "hello.default.svc.cluster.local"
SHOP = "shop.example.com"


class Reviewer:
    """Reviews of the callers' tokens and of one pod's token. Tests can change or delay the answers."""

    def __init__(self) -> None:
        self.pod: ReviewedToken | Exception = POD.reviewed
        self.node: ReviewedToken | Exception = DRIVER.reviewed
        self.controller: ReviewedToken | Exception = CONTROLLER.reviewed
        self.calls, self.gate = 0, asyncio.Event()
        self.gate.set()

    async def review(self, _token: Secret[str], audience: str) -> ReviewedToken:
        self.calls += 1
        await self.gate.wait()
        answer = {NODE_AUDIENCE: self.node, SECRETS_AUDIENCE: self.controller}.get(audience, self.pod)
        if isinstance(answer, Exception):
            raise answer
        return answer


class RecordedEvents:
    """Pod events: pod, whether it is a warning, reason and message."""

    def __init__(self) -> None:
        self.all: list[tuple[str, bool, str, str]] = []

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        self.all.append((pod.pod_name, warning, reason, message))


class Cluster:
    """Publishes the keys of a token issuer."""

    def __init__(self, issuer: TokenIssuer) -> None:
        self.issuer = issuer
        self.unavailable = False

    async def fetch(self) -> PublishedKeys:
        if self.unavailable:
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "the API server cannot be reached")
        return self.issuer.published


@dataclass
class World:
    """One authority and its environment."""

    folder: Path
    issuer: TokenIssuer
    cluster: Cluster
    issuers: Path | None = None  # the issuers file
    serving_names: tuple[str, ...] = (SERVING_NAME,)
    reviewer: Reviewer = field(default_factory=Reviewer)
    events: RecordedEvents = field(default_factory=RecordedEvents)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    settings: Mapping[str, Any] = field(default_factory=dict)  # in place of the defaults
    calls: str = "unary"  # "stream": callers send their requests on an IssueStream
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    key: PrivateKey = field(default_factory=lambda: generate_key(KeyType.EC_P256))

    def __post_init__(self) -> None:
        self.policy = self.folder / "policy.yaml"
        self.policy.write_text(POLICY)
        self.ca = self.folder / "ca"
        self.server = self.replica(self.registry)

    def replica(self, registry: CollectorRegistry) -> AuthorityServer:
        settings = AuthoritySettings(
            listen="127.0.0.1:0",
            trust_domain="cluster.local",
            cluster_domain="cluster.local",
            policy=self.policy,
            serving_names=Names.of(map(DNSName.parse, self.serving_names)),
            node_account=ServiceAccount("certmount", "certmount-node"),
            issuers=self.issuers,
        )
        settings = replace(settings, **self.settings)
        stores = DirectoryStore(self.ca), DirectoryStore(self.ca, "acknowledgements.json")
        publisher = DirectoryPublisher(self.ca)
        environment = Environment(*stores, publisher, self.cluster.fetch, self.reviewer, events=self.events)
        return AuthorityServer(settings, environment, AuthorityMetrics(registry))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[AuthorityServer]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.server.run(self.stop))
            await until(lambda: not self.server.unready(), "the authority")
            try:
                yield self.server
            finally:
                self.stop.set()

    @contextlib.asynccontextmanager
    async def channel(
        self,
        port: int | None = None,
        roots: bytes | None = None,
        name: str = SERVING_NAME,
        window: int | None = None,  # how many bytes of responses gRPC receives that are not read
    ) -> AsyncIterator[grpc.aio.Channel]:
        credentials = grpc.ssl_channel_credentials(roots or (self.ca / "authority.crt").read_bytes())
        options: tuple[tuple[str, str | int], ...] = (
            ("grpc.ssl_target_name_override", name),
            ("grpc.use_local_subchannel_pool", 1),
        )
        if window is not None:
            options += (("grpc.http2.lookahead_bytes", window), ("grpc.http2.bdp_probe", 0))
        address = f"127.0.0.1:{port or self.server.port}"
        async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
            yield channel

    def csr(self, *names: str) -> bytes:
        return build_csr(self.key, Names.of([DNSName.parse(name) for name in names]))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


def secrets_world(folder: Path, issuer: TokenIssuer, policy: str, issuers: Path | None = None) -> World:
    """Return an authority that serves the Secrets controller under a policy."""
    account = ServiceAccount(CONTROLLER.namespace, CONTROLLER.service_account)
    world = World(folder, issuer, Cluster(issuer), issuers, settings={"secrets_account": account})
    world.policy.write_text(policy)
    return world


class Caller:
    """Calls the authority as the node driver does. Tests can replace every argument by an invalid one."""

    def __init__(self, world: World, channel: grpc.aio.Channel) -> None:
        self._world = world
        self.channel = channel
        self._stub = authority_pb2_grpc.AuthorityStub(channel)
        self._streams: dict[Metadata, IssueStream] = {}
        self._node = world.issuer.node_token()  # one token, because another one opens another stream

    async def issue(
        self,
        csr: bytes | None = None,
        pod: Secret[str] | None = None,
        node: Secret[str] | None = None,
        duration: timedelta | Duration | None = None,
        metadata: Metadata | None = None,
        **fields: Any,
    ) -> authority_pb2.IssueResponse:
        world = self._world
        token = (pod or world.issuer.pod_token(POD)).reveal()
        request = authority_pb2.IssueRequest(csr=world.csr(NAME) if csr is None else csr, pod_token=token, **fields)
        if isinstance(duration, timedelta):
            request.duration.FromTimedelta(duration)
        elif duration is not None:
            request.duration.CopyFrom(duration)
        return await self.send(request, node, metadata)

    async def send(
        self, request: authority_pb2.IssueRequest, node: Secret[str] | None = None, metadata: Metadata | None = None
    ) -> authority_pb2.IssueResponse:
        sent = self.bearer(node) if metadata is None else tuple(metadata)
        while self._world.calls == "stream":
            try:
                return result(await self.stream(sent).issue(request))
            except grpc.aio.AioRpcError as error:
                # grpc.aio loses the status of a stream that the authority ends while a request is written.
                if error.details() != STREAM_LOST:
                    raise
        return await self._stub.Issue(request, metadata=sent, timeout=30)

    def stream(self, metadata: Metadata) -> IssueStream:
        """Return the open stream with a token, or a new one."""
        stream = self._streams.get(metadata)
        if stream is None or not stream.open:
            stream = self._streams[metadata] = IssueStream(self._stub.IssueStream(metadata=tuple(metadata)))
        return stream

    async def rejected(self, **arguments: Any) -> CallFailure:
        return await failure_of(self.issue(**arguments))

    async def report(self, condition: int, reason: str = "", message: str = "", pod: Secret[str] | None = None) -> None:
        token: Any = (pod or self._world.issuer.pod_token(POD)).reveal()
        fields: dict[str, Any] = {"condition": condition, "reason": reason, "message": message}
        request = authority_pb2.ReportRequest(pod_token=token, **fields)
        await self._stub.Report(request, metadata=self.bearer(), timeout=30)

    def watch(self, node: Secret[str] | None = None) -> Any:
        return self._stub.WatchTrust(authority_pb2.WatchTrustRequest(), metadata=self.bearer(node))

    def bearer(self, node: Secret[str] | None = None) -> tuple[tuple[str, str], ...]:
        token = self._node if node is None else node
        return (("authorization", f"Bearer {token.reveal()}"),)


def result(response: authority_pb2.IssueStreamResponse) -> authority_pb2.IssueResponse:
    """Return the response to a request on a stream; raises its failure as that of a call."""
    if response.HasField("issued"):
        return response.issued
    failure, none = response.failure, grpc.aio.Metadata()
    status = grpc.StatusCode[REASONS[failure.reason].kind.status]
    raise grpc.aio.AioRpcError(status, none, grpc.aio.Metadata((REASON_KEY, failure.reason)), failure.message)


class Controller:
    """Calls the authority as the Secrets controller does. Tests can replace every argument by an invalid one."""

    def __init__(self, world: World, channel: grpc.aio.Channel) -> None:
        self._world = world
        self._stub = authority_pb2_grpc.SecretsStub(channel)

    async def issue(
        self,
        *names: str,
        namespace: str = "shop",
        secret: str = "shop-tls",  # a name
        token: Secret[str] | None = None,
        duration: timedelta | None = None,
        csr: bytes | None = None,
        **fields: Any,
    ) -> authority_pb2.IssueResponse:
        csr = self._world.csr(*(names or (SHOP,))) if csr is None else csr
        request = authority_pb2.IssueForSecretRequest(csr=csr, namespace=namespace, secret=secret, **fields)
        if duration is not None:
            request.duration.FromTimedelta(duration)
        return await self._stub.Issue(request, metadata=self._bearer(token), timeout=30)

    async def rejected(self, *names: str, **arguments: Any) -> CallFailure:
        return await failure_of(self.issue(*names, **arguments))

    def watch(self, token: Secret[str] | None = None) -> Any:
        return self._stub.WatchTrust(authority_pb2.WatchTrustRequest(), metadata=self._bearer(token))

    def _bearer(self, token: Secret[str] | None) -> tuple[tuple[str, str], ...]:
        token = self._world.issuer.controller_token() if token is None else token
        return (("authorization", f"Bearer {token.reveal()}"),)
