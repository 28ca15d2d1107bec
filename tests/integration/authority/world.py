"""A real authority on loopback, with a token issuer and a reviewer that tests control, and a client that may misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from csi_driver import NODE_AUDIENCE
from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.environment import Environment
from csi_driver.authority.server import AuthorityServer, AuthoritySettings
from csi_driver.authority.storage import DirectoryStore
from csi_driver.authority.trust.bundles import DirectoryPublisher
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.cluster.token_review import PublishedKeys, ReviewedToken
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
NAME = "hello.default.svc.cluster.local"


class Reviewer:
    """The live cluster: knows the driver and one pod; a test may let it say something else, or nothing."""

    def __init__(self) -> None:
        self.pod: ReviewedToken | Exception = POD.reviewed
        self.node: ReviewedToken | Exception = DRIVER.reviewed
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def review(self, _token: Secret[str], audience: str) -> ReviewedToken:
        self.asked += 1
        await self.gate.wait()
        answer = self.node if audience == NODE_AUDIENCE else self.pod
        if isinstance(answer, Exception):
            raise answer
        return answer


class Heard:
    """Keeps what would be said on pods."""

    def __init__(self) -> None:
        self.events: list[tuple[str, bool, str, str]] = []

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        self.events.append((pod.pod_name, warning, reason, message))


class Cluster:
    """Publishes an issuer's keys, unless it is down."""

    def __init__(self, issuer: TokenIssuer) -> None:
        self.issuer = issuer
        self.down = False

    async def fetch(self) -> PublishedKeys:
        if self.down:
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "the API server cannot be reached")
        return self.issuer.published


@dataclass(frozen=True)
class Refusal:
    """How a call failed."""

    code: grpc.StatusCode
    reason: str
    text: str

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Refusal:
        metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
        return cls(error.code(), metadata.get(REASON_KEY, ""), error.details() or "")


@dataclass
class World:
    """One authority and all around it."""

    folder: Path
    issuer: TokenIssuer
    cluster: Cluster
    issuers: Path | None = None
    """The file that declares issuers outside."""
    serving_names: tuple[str, ...] = (SERVING_NAME,)
    reviewer: Reviewer = field(default_factory=Reviewer)
    heard: Heard = field(default_factory=Heard)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    key: PrivateKey = field(default_factory=lambda: generate_key(KeyType.EC_P256))

    def __post_init__(self) -> None:
        self.policy = self.folder / "policy.yaml"
        self.policy.write_text(POLICY)
        self.ca = self.folder / "ca"
        self.server = self.replica(self.registry)

    def replica(self, registry: CollectorRegistry) -> AuthorityServer:
        """An authority on the same store; each call makes another one."""
        settings = AuthoritySettings(
            listen="127.0.0.1:0",
            trust_domain="cluster.local",
            cluster_domain="cluster.local",
            policy=self.policy,
            serving_names=Names.of([DNSName.parse(name) for name in self.serving_names]),
            node_account=ServiceAccount("certmount", "certmount-node"),
            issuers=self.issuers,
        )
        around = Environment(
            DirectoryStore(self.ca),
            DirectoryStore(self.ca, "confirmations.json"),
            DirectoryPublisher(self.ca),
            self.cluster.fetch,
            self.reviewer,
            events=self.heard,
        )
        return AuthorityServer(settings, around, AuthorityMetrics(registry))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[AuthorityServer]:
        """Serves until the block ends."""
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
        """A TLS connection that trusts the published root only and checks the serving name."""
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
    """Calls as the node driver does; every argument may be replaced by a worse one."""

    def __init__(self, world: World, channel: grpc.aio.Channel) -> None:
        self._world = world
        self._stub = authority_pb2_grpc.AuthorityStub(channel)

    async def issue(
        self,
        csr: bytes | None = None,
        pod: Secret[str] | None = None,
        node: Secret[str] | None = None,
        duration: timedelta | None = None,
        metadata: Sequence[tuple[str, str]] | None = None,
    ) -> authority_pb2.IssueResponse:
        world = self._world
        request = authority_pb2.IssueRequest(
            csr=world.csr(NAME) if csr is None else csr,
            pod_token=(pod or world.issuer.pod_token(POD)).reveal(),
        )
        if duration is not None:
            request.duration.FromTimedelta(duration)
        return await self.send(request, node, metadata)

    async def send(
        self,
        request: authority_pb2.IssueRequest,
        node: Secret[str] | None = None,
        metadata: Sequence[tuple[str, str]] | None = None,
    ) -> authority_pb2.IssueResponse:
        shown = self.bearer(node) if metadata is None else metadata
        return await self._stub.Issue(request, metadata=tuple(shown), timeout=30)

    async def refused(self, **arguments: Any) -> Refusal:
        """How :meth:`issue` fails with these arguments."""
        try:
            await self.issue(**arguments)
        except grpc.aio.AioRpcError as error:
            return Refusal.of(error)
        raise AssertionError("it was issued")

    async def report(self, condition: int, reason: str = "", message: str = "", pod: Secret[str] | None = None) -> None:
        """Tells what has become of the pod's certificate."""
        token = (pod or self._world.issuer.pod_token(POD)).reveal()
        request = authority_pb2.ReportRequest(
            pod_token=token,
            condition=condition,  # type: ignore[arg-type]  # also such that there is no such condition
            reason=reason,
            message=message,
        )
        await self._stub.Report(request, metadata=self.bearer(), timeout=30)

    def watch(self, node: Secret[str] | None = None) -> Any:
        """The WatchTrust call."""
        return self._stub.WatchTrust(authority_pb2.WatchTrustRequest(), metadata=self.bearer(node))

    def bearer(self, node: Secret[str] | None = None) -> tuple[tuple[str, str], ...]:
        token = self._world.issuer.node_token() if node is None else node
        return (("authorization", f"Bearer {token.reveal()}"),)
