"""Measures trust streams of many nodes: real TLS connections to one authority, all from this process."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import grpc

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.node.trust.trust_follower import follow_trust
from csi_driver.rpc.authority_channel import _OPTIONS
from csi_driver.rpc.authority_messages import TrustBundle, trust_bundle
from tests.bench.authority_input import driver_on
from tests.bench.authority_server import POLICY
from tests.bench.growth.series import growth
from tests.bench.table import Figure
from tests.bench.world import WrongResultError
from tests.integration.authority.world import SERVING_NAME
from tests.support.machine import cpu_s, rss_mb, wait_until_idle
from tests.support.ports import free_port
from tests.support.tokens import TokenIssuer

_NODES = (1, 10, 100, 1000)
_AT_ONCE = 32  # more connections from one address would exceed the share of unauthenticated calls
_OUTAGE_S = 90.0
"""Then the pauses of all nodes between attempts have reached their maximum, as after an hour."""
_WORST = 3.0


class _NoVolumes:
    """The root sets of a node without volumes: nothing is acknowledged."""

    def written(self, _acknowledged: Mapping[str, int]) -> Mapping[str, int]:
        return {}

    async def changed(self) -> None:
        await asyncio.Event().wait()


@dataclass(eq=False)
class _Node:
    """A node that follows the trust stream with the code of the driver, on its own connection."""

    address: str
    roots: bytes
    token: str
    changed: asyncio.Event
    revision: str = ""
    connected_at: float | None = None

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        credentials = grpc.ssl_channel_credentials(self.roots)
        own = (("grpc.ssl_target_name_override", SERVING_NAME), ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.secure_channel(self.address, credentials, options=(*_OPTIONS, *own)) as channel:
            metadata = (("authorization", f"Bearer {self.token}"),)
            watch = authority_pb2_grpc.AuthorityStub(channel).WatchTrust
            try:
                async for bundle in watch(authority_pb2.WatchTrustRequest(), metadata=metadata):
                    yield trust_bundle(bundle)
            except grpc.aio.AioRpcError as error:
                raise CertmountError(Reason.AUTHORITY_UNAVAILABLE, error.details() or "") from None

    async def acknowledge_root_set(self, name: str, generation: int) -> None:
        raise AssertionError(name, generation)

    def apply(self, bundle: TrustBundle) -> None:
        self.revision = bundle.policy_revision

    def report(self, connected: bool) -> None:  # the signature of follow_trust
        self.connected_at = time.monotonic() if connected else None
        self.changed.set()


@dataclass(eq=False)
class _Nodes:
    """Nodes with one authority."""

    issuer: TokenIssuer
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    all: list[_Node] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def connect(self, server: _Server, count: int) -> None:
        rng = Random(1)  # noqa: S311  # jitter
        for number in range(count):
            token = self.issuer.node_token(driver_on(number)).reveal()
            node = _Node(server.address, server.roots, token, self.changed)
            following = follow_trust(node, node.apply, _NoVolumes(), rng.random, node.report)
            self.all.append(node)
            self._tasks.append(asyncio.create_task(following))
            if number % _AT_ONCE == _AT_ONCE - 1:
                await self.until(lambda node: node.connected_at is not None)
        await self.until(lambda node: node.connected_at is not None)

    async def until(self, holds: Callable[[_Node], bool]) -> None:
        """Wait until a condition holds for all nodes."""
        async with asyncio.timeout(300):
            while not all(map(holds, self.all)):
                self.changed.clear()
                await self.changed.wait()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Server:
    pid: int
    address: str
    roots: bytes


async def measure_streams(directory: Path) -> list[Figure]:
    issuer = TokenIssuer()
    sizes = {count: await _size(directory / f"nodes-{count}", issuer, count) for count in _NODES}
    connect, change, memory = (dict(zip(sizes, values, strict=True)) for values in zip(*sizes.values(), strict=True))
    method = "CPU time of the authority, each node with its own TLS connection"
    return [
        growth("trust streams: one node connects", connect, "us", method),
        growth(
            "trust streams: a change of the policy, per node", change, "us", f"{method}; from the change of the file"
        ),
        growth("trust streams: memory of one", memory, "kB", "growth of the authority's VmRSS"),
        await _storm(directory / "storm", issuer),
    ]


async def _size(directory: Path, issuer: TokenIssuer, count: int) -> tuple[float, float, float]:
    """Return the CPU time of a connection and of a change, and the memory, per node."""
    nodes = _Nodes(issuer)
    async with _serving(directory, issuer, free_port()) as server:
        await wait_until_idle(server.pid)
        memory, before = rss_mb(server.pid), cpu_s(server.pid)
        try:
            await nodes.connect(server, count)
            await wait_until_idle(server.pid)
            connected = cpu_s(server.pid)
            memory = rss_mb(server.pid) - memory
            first = nodes.all[0].revision
            (directory / "policy.yaml").write_text(f"# changed\n{POLICY}")
            await nodes.until(lambda node: node.revision not in {"", first})
            await wait_until_idle(server.pid)
            changed = cpu_s(server.pid)
        finally:
            await nodes.close()
    return (connected - before) / count * 1e6, (changed - connected) / count * 1e6, memory * 1e3 / count


async def _storm(directory: Path, issuer: TokenIssuer) -> Figure:
    """Stop the authority, start it again on the same port, and count the nodes that are connected after each second."""
    nodes, count, port = _Nodes(issuer), _NODES[-1], free_port()
    try:
        async with _serving(directory, issuer, port) as server:
            await nodes.connect(server, count)
        await nodes.until(lambda node: node.connected_at is None)
        await asyncio.sleep(_OUTAGE_S)  # the outage is what is measured
        async with _serving(directory, issuer, port):
            started = time.monotonic()
            await nodes.until(lambda node: node.connected_at is not None)
            times = [(node.connected_at or 0.0) - started for node in nodes.all]
    finally:
        await nodes.close()
    seconds = Counter(map(int, times))
    mean, worst = count / max(times), max(seconds.values())
    return Figure(
        f"{count:,} trust streams after an outage: worst second",
        f"{worst / mean:.2f} x the mean: {worst}, {mean:.0f} a second; all connected after {max(times):.0f} s",
        f"{_WORST:g} x",
        worst <= _WORST * mean,
        method=f"the driver's own code reconnects. The outage lasts {_OUTAGE_S:g} s, so that all nodes have the longest pauses",
    )


@asynccontextmanager
async def _serving(directory: Path, issuer: TokenIssuer, port: int) -> AsyncIterator[_Server]:
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240  # nothing else runs
    (directory / "jwks.json").write_bytes(issuer.published.jwks)
    command = (sys.executable, "-m", "tests.bench.authority_server", str(directory), f"--port={port}")
    pipe = asyncio.subprocess.PIPE
    with (directory / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=log)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not await process.stdout.readline():
            raise WrongResultError(f"the authority is not serving:\n{(directory / 'log').read_text()}")
        yield _Server(process.pid, f"127.0.0.1:{port}", (directory / "ca" / "authority.crt").read_bytes())
    finally:
        process.stdin.close()
        await process.wait()
