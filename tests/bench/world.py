"""What every measurement runs on: an authority and a driver, each a process of its own, and a kubelet that calls them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc

from csi_driver._proto import csi_pb2, csi_pb2_grpc
from csi_driver.host.mountinfo import read_mounts
from csi_driver.host.syscalls import MNT_DETACH, unmount
from tests.support.driver import free_port
from tests.support.kubelet import FakePod, Kubelet, node_stub
from tests.support.requirements import may_mount

ISSUER_DELAY_MS = 20
MOUNTS = "kernel" if may_mount() else "directory"
_START_S = 30.0
_POLL_S = 0.001
# structlog loads rich where it finds it: 4 MB that a development environment has and an installed driver has not.
_COMMAND = "import sys; sys.modules['rich'] = None; from csi_driver.cli.main import main; main()"

PublishRequest = csi_pb2.NodePublishVolumeRequest


class WrongResult(Exception):
    """Something did not work as it must, so that its time means nothing."""


class Issuer:
    """The authority's process."""

    def __init__(self, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.address = (folder / "address").read_text()
        # Bytecode is made at a program's first start and found by the later ones, as in an image, where it is made once.
        self.environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._process = process

    @classmethod
    async def start(cls, folder: Path, delay_ms: float) -> Issuer:
        command = [sys.executable, "-m", "tests.bench.issuer", str(folder), f"--delay-ms={delay_ms}"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        assert process.stdout is not None
        if await process.stdout.readline() != b"ready\n":
            raise WrongResult("the scripted authority did not start")
        return cls(folder, process)

    async def handled(self) -> list[float]:
        """Seconds spent in the authority by each Issue since the last question."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        seconds: list[float] = json.loads(await self._process.stdout.readline())
        return seconds

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


class Node:
    """The driver's process, on a kubelet directory of its own, with the settings of a user."""

    def __init__(self, folder: Path, issuer: Issuer) -> None:
        self.kubelet = Kubelet(folder / "kubelet")
        self.log = folder / "log"
        self._http = f"127.0.0.1:{free_port()}"
        self._arguments = [
            f"--kubelet-dir={self.kubelet.root}",
            "--node-name=node1",
            f"--authority={issuer.address}",
            f"--authority-root={issuer.folder / 'root.crt'}",
            f"--token={issuer.folder / 'node-token'}",
            f"--http={self._http}",
            f"--mounts={MOUNTS}",
        ]
        self._environment = issuer.environment
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> float:
        """Starts it; gives the seconds until its first answer on the CSI socket."""
        started = time.perf_counter()
        with self.log.open("ab") as log:
            command = [sys.executable, "-c", _COMMAND, "node", *self._arguments]
            self._process = await asyncio.create_subprocess_exec(
                *command, stdout=log, stderr=log, env=self._environment
            )
        while not self._listens():
            if self._process.returncode is not None or time.perf_counter() - started > _START_S:
                raise WrongResult(f"the driver does not serve:\n{self.log.read_text()}")
            await asyncio.sleep(_POLL_S)
        async with self.kubelet.channel() as channel:
            await csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest())
        return time.perf_counter() - started

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.kubelet.socket))
            except OSError:
                return False
            return True

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(number)
        await process.wait()

    def call_seconds(self, method: str) -> tuple[int, float]:
        """Successful calls of one CSI method, and the driver's own seconds for them, so far."""
        text = self.get("/metrics")
        pattern = rf'^certmount_node_call_seconds_(count|sum){{method="{method}",reason=""}} (\S+)$'
        found = {kind: float(value) for kind, value in re.findall(pattern, text, re.MULTILINE)}
        return int(found.get("count", 0)), found.get("sum", 0.0)

    def get(self, path: str) -> str:
        """The body of a page of the driver's HTTP port, whatever its status."""
        try:
            with urllib.request.urlopen(f"http://{self._http}{path}", timeout=10) as response:
                body: bytes = response.read()
        except urllib.error.HTTPError as error:
            with error:
                body = error.read()
        return body.decode()


class World:
    """Authority, driver, and one connection to the driver's CSI socket that is used over and over."""

    def __init__(self, folder: Path, issuer: Issuer, node: Node) -> None:
        self.folder = folder
        self.issuer = issuer
        self.node = node
        self.published: dict[str, PublishRequest] = {}
        self._channel = node.kubelet.channel()
        self._stub = node_stub(self._channel)

    def request(self, **attributes: str) -> PublishRequest:
        """The kubelet's call for a volume of a new pod."""
        return self.node.kubelet.publish_request(FakePod(), attributes)

    async def publish(self, request: PublishRequest) -> float:
        """Publishes, or publishes again; gives the seconds as the kubelet sees them."""
        self.published[request.volume_id] = request
        started = time.perf_counter()
        await self._stub.NodePublishVolume(request)
        return time.perf_counter() - started

    async def wait_and_ask(self, pause_s: float) -> float:
        """A call without any work in it after a pause; gives the call's seconds and what the pause was too long."""
        started = time.perf_counter()
        await asyncio.sleep(pause_s)
        await self._stub.NodeGetInfo(csi_pb2.NodeGetInfoRequest())
        return time.perf_counter() - started - pause_s

    async def publish_at_once(self, requests: Iterable[PublishRequest]) -> float:
        """Publishes all side by side; gives the seconds until the last answer."""
        started = time.perf_counter()
        await asyncio.gather(*map(self.publish, requests))
        return time.perf_counter() - started

    async def unpublish_all(self) -> None:
        for request in self.published.values():
            await self._stub.NodeUnpublishVolume(self.node.kubelet.unpublish_request(request))
            self._check_gone(request)
        self.published.clear()

    async def restart(self) -> float:
        """Kills the driver and starts it again; gives the seconds until it serves."""
        await self.node.end(signal.SIGKILL)
        seconds = await self.node.start()
        await self._connect_again()
        return seconds

    async def _connect_again(self) -> None:
        await self._channel.close()
        self._channel = self.node.kubelet.channel()
        self._stub = node_stub(self._channel)

    async def kubelet_call(self, request: PublishRequest, *, stats: bool) -> None:
        """One republish or one question for statistics on a connection of its own, as the kubelet makes them."""
        async with self.node.kubelet.channel() as channel:
            stub = node_stub(channel)
            if stats:
                path = request.target_path
                await stub.NodeGetVolumeStats(
                    csi_pb2.NodeGetVolumeStatsRequest(volume_id=request.volume_id, volume_path=path)
                )
            else:
                await stub.NodePublishVolume(request)

    def check_files(self, request: PublishRequest) -> None:
        """Raises WrongResult unless the pod sees its three files."""
        for name in ("root.crt", "site.crt", "site.key"):
            if not (Path(request.target_path) / name).read_bytes():
                raise WrongResult(f"{request.target_path}/{name} is empty")

    @staticmethod
    def _check_gone(request: PublishRequest) -> None:
        if Path(request.target_path).exists():
            raise WrongResult(f"{request.target_path} is still there after unpublish")

    async def close(self) -> None:
        with suppress(grpc.aio.AioRpcError):
            await self.unpublish_all()
        await self._channel.close()


@asynccontextmanager
async def issuing(folder: Path, delay_ms: float = ISSUER_DELAY_MS) -> AsyncIterator[Issuer]:
    """An authority for the length of the block."""
    (folder / "issuer").mkdir()
    issuer = await Issuer.start(folder / "issuer", delay_ms)
    try:
        yield issuer
    finally:
        await issuer.stop()


@asynccontextmanager
async def driving(folder: Path, issuer: Issuer) -> AsyncIterator[World]:
    """A driver with no volume for the length of the block; its volumes are unpublished at the end."""
    node = Node(folder, issuer)
    await node.start()  # the first start makes bytecode
    await node.end()
    await node.start()
    world = World(folder, issuer, node)
    try:
        yield world
    finally:
        await world.close()
        await node.end()


def unmount_left(folder: Path) -> None:
    """Takes away the mounts that a driver which did not end well left below the folder."""
    for mount in reversed(list(read_mounts())):
        if mount.point.startswith(f"{folder}/"):
            unmount(mount.point, MNT_DETACH)
