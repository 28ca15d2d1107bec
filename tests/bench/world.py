"""The setup of the measurements: an authority process, a driver process, and a simulated kubelet that calls the driver."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc

from csi_driver._proto import csi_pb2, csi_pb2_grpc
from csi_driver.host.mountinfo import read_mounts
from csi_driver.host.syscalls import MNT_DETACH, unmount
from tests.support.driver import Driver
from tests.support.kubelet import FakePod, Kubelet, node_stub
from tests.support.requirements import may_mount

ISSUER_DELAY_MS = 20
MOUNTS = "kernel" if may_mount() else "directory"
_START_S = 30.0
_POLL_S = 0.001
# structlog loads rich if it is installed: 4 MB in a development environment that an installed driver does not have.
_COMMAND = "import sys; sys.modules['rich'] = None; from csi_driver.cli.main import main; main()"

PublishRequest = csi_pb2.NodePublishVolumeRequest


class WrongResultError(Exception):
    """A measured operation had a wrong result, so the measurement is invalid."""


class Issuer:
    """The process of the scripted authority."""

    def __init__(self, directory: Path, process: asyncio.subprocess.Process) -> None:
        self.directory = directory
        self.address = (directory / "address").read_text()
        # The first start of a program writes bytecode and later ones read it, as in an image.
        self.environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory / "bytecode")}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._process = process

    async def handled(self) -> list[float]:
        """Return the seconds that each Issue call since the last query took in the authority."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        seconds: list[float] = json.loads(await self._process.stdout.readline())
        return seconds


class Node(Driver):
    """The driver's process with default settings and its own kubelet directory."""

    def __init__(self, directory: Path, issuer: Issuer) -> None:
        self.kubelet, self.log = Kubelet(directory / "kubelet"), directory / "log"
        root, token = issuer.directory / "root.crt", issuer.directory / "node-token"
        super().__init__(self.kubelet, issuer.address, root, token, self.log)
        self._arguments.remove("--log-level=debug")
        self._environment = issuer.environment

    async def timed_start(self) -> float:
        """Start the driver; return the seconds until its first response on the CSI socket."""
        started = time.perf_counter()
        with self.log.open("ab") as log:
            command, env = [sys.executable, "-c", _COMMAND, "node", *self._arguments], self._environment
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=env)
        while not self._listens():
            if not self.running or time.perf_counter() - started > _START_S:
                raise WrongResultError(f"the driver is not serving:\n{self.log_text()}")
            await asyncio.sleep(_POLL_S)
        async with self.kubelet.channel() as channel:
            await csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest())
        return time.perf_counter() - started

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.kubelet.socket)) == 0

    def call_seconds(self, method: str) -> tuple[int, float]:
        """Return the number of successful calls of a CSI method so far, and the seconds that the driver measured for them."""
        pattern = rf'^certmount_node_call_duration_seconds_(count|sum){{method="{method}",reason="Ok"}} (\S+)$'
        found = {kind: float(value) for kind, value in re.findall(pattern, self.get("/metrics")[1], re.MULTILINE)}
        return int(found.get("count", 0)), found.get("sum", 0.0)


class World:
    """The authority, the driver, and one connection to the driver's CSI socket."""

    def __init__(self, directory: Path, issuer: Issuer, node: Node) -> None:
        self.directory, self.issuer, self.node = directory, issuer, node
        self.published: dict[str, PublishRequest] = {}
        self._channel = node.kubelet.channel()
        self._stub = node_stub(self._channel)

    def request(self, **attributes: str) -> PublishRequest:
        return self.node.kubelet.publish_request(FakePod(), attributes)

    async def publish(self, request: PublishRequest) -> float:
        """Publish or republish; return the seconds that the kubelet measures."""
        self.published[request.volume_id] = request
        started = time.perf_counter()
        await self._stub.NodePublishVolume(request)
        return time.perf_counter() - started

    async def pause_and_call(self, pause_s: float) -> float:
        """Make an empty call after a pause; return the seconds of the call plus the delay of the pause."""
        started = time.perf_counter()
        await asyncio.sleep(pause_s)
        await self._stub.NodeGetInfo(csi_pb2.NodeGetInfoRequest())
        return time.perf_counter() - started - pause_s

    async def publish_at_once(self, requests: Iterable[PublishRequest]) -> float:
        """Publish all concurrently; return the seconds until the last response."""
        started = time.perf_counter()
        await asyncio.gather(*map(self.publish, requests))
        return time.perf_counter() - started

    async def unpublish(self, requests: Iterable[PublishRequest]) -> None:
        for request in requests:
            await self._stub.NodeUnpublishVolume(self.node.kubelet.unpublish_request(request))

    async def unpublish_all(self) -> None:
        await self.unpublish(self.published.values())
        self._check_removed()
        self.published.clear()

    def _check_removed(self) -> None:
        for request in self.published.values():
            if os.path.lexists(request.target_path):
                raise WrongResultError(f"{request.target_path} still exists after unpublish")

    async def restart(self) -> float:
        """Kill and restart the driver; return the seconds until it serves."""
        await self.node.kill()
        seconds = await self.node.timed_start()
        await self._channel.close()
        self._channel = self.node.kubelet.channel()
        self._stub = node_stub(self._channel)
        return seconds

    async def kubelet_call(self, request: PublishRequest, *, stats: bool) -> None:
        """Make one republish or volume stats call on a new connection, like the kubelet."""
        volume, path = request.volume_id, request.target_path
        async with self.node.kubelet.channel() as channel:
            if stats:
                query = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=path)
                await node_stub(channel).NodeGetVolumeStats(query)
            else:
                await node_stub(channel).NodePublishVolume(request)

    def check_files(self, request: PublishRequest) -> None:
        """Raise WrongResultError unless the pod sees its three files."""
        for name in ("root.crt", "site.crt", "site.key"):
            if not (Path(request.target_path) / name).read_bytes():
                raise WrongResultError(f"{request.target_path}/{name} is empty")

    async def close(self) -> None:
        with suppress(grpc.aio.AioRpcError):
            await self.unpublish_all()
        await self._channel.close()


@asynccontextmanager
async def issuing(directory: Path, delay_ms: float = ISSUER_DELAY_MS) -> AsyncIterator[Issuer]:
    """Run the scripted authority in its own directory."""
    (directory / "issuer").mkdir(parents=True)
    options, pipe = (str(directory / "issuer"), f"--delay-ms={delay_ms}"), asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "tests.bench.issuer", *options]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    if await process.stdout.readline() != b"ready\n":
        raise WrongResultError("the scripted authority did not start")
    try:
        yield Issuer(directory / "issuer", process)
    finally:
        process.stdin.close()
        await process.wait()


@asynccontextmanager
async def driving(directory: Path, issuer: Issuer) -> AsyncIterator[World]:
    """Run a driver without volumes; unpublish its volumes at the end."""
    node = Node(directory, issuer)
    await node.timed_start()  # the first start writes bytecode
    await node.stop()
    await node.timed_start()
    world = World(directory, issuer, node)
    try:
        yield world
    finally:
        await world.close()
        await node.stop()


def unmount_leftovers(directory: Path) -> None:
    """Unmount what a failed driver left below the directory."""
    for mount in reversed(list(read_mounts())):
        if mount.point.startswith(f"{directory}/"):
            unmount(mount.point, MNT_DETACH)
