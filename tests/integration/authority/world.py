"""An authority on the loopback interface, with a token issuer and a reviewer that tests control, and a client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from prometheus_client import CollectorRegistry

from csi_driver import NODE_AUDIENCE
from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.environment import Environment
from csi_driver.authority.server import AuthorityServer, AuthoritySettings
from csi_driver.authority.storage import DirectoryStore
from csi_driver.authority.trust.bundles import DirectoryPublisher
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.cluster.objects import PublishedKeys, ReviewedToken
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.rpc.errors import REASON_KEY
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import DRIVER, Pod, TokenIssuer
from tests.support.waiting import until

SERVING_NAME = "certmount-authority.certmount.svc"
POLICY = """
policy:
- match: {namespaces: [default], serviceAccounts: [hello]}
  allow: {dns: ["*.{namespace}.svc.{cluster_domain}"], uris: ["spiffe://{trust_domain}/extra/*"]}
"""
POD = Pod()
Metadata = Sequence[tuple[str, str]]
NAME = "hello.default.svc.cluster.local"


class Reviewer:
    """Reviews of the driver's token and of one pod's token. Tests can change or delay the answers."""

    def __init__(self) -> None:
        self.pod: ReviewedToken | Exception = POD.reviewed
        self.node: ReviewedToken | Exception = DRIVER.reviewed
        self.calls, self.gate = 0, asyncio.Event()
        self.gate.set()

    async def review(self, _token: Secret[str], audience: str) -> ReviewedToken:
        self.calls += 1
        await self.gate.wait()
        answer = self.node if audience == NODE_AUDIENCE else self.pod
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


@dataclass(frozen=True)
class CallFailure:
    """The status of a failed call."""

    code: grpc.StatusCode
    reason: str
    text: str

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> CallFailure:
        metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
        return cls(error.code(), metadata.get(REASON_KEY, ""), error.details() or "")


async def failure_of(call: Awaitable[object]) -> CallFailure:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return CallFailure.of(error)
    raise AssertionError("the call succeeded")


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
        self, options: Sequence[tuple[str, Any]] = (), port: int | None = None
    ) -> AsyncIterator[grpc.aio.Channel]:
        credentials = grpc.ssl_channel_credentials((self.ca / "authority.crt").read_bytes())
        own = (("grpc.ssl_target_name_override", SERVING_NAME), ("grpc.use_local_subchannel_pool", 1), *options)
        address = f"127.0.0.1:{port or self.server.port}"
        async with grpc.aio.secure_channel(address, credentials, options=own) as channel:
            yield channel

    def csr(self, *names: str) -> bytes:
        return build_csr(self.key, Names.of([DNSName.parse(name) for name in names]))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


class Caller:
    """Calls the authority as the node driver does. Tests can replace every argument by an invalid one."""

    def __init__(self, world: World, channel: grpc.aio.Channel) -> None:
        self._world = world
        self._stub = authority_pb2_grpc.AuthorityStub(channel)

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
        sent = self.bearer(node) if metadata is None else metadata
        return await self._stub.Issue(request, metadata=tuple(sent), timeout=30)

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
        token = self._world.issuer.node_token() if node is None else node
        return (("authorization", f"Bearer {token.reveal()}"),)
