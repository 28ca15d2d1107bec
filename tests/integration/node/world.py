"""One node under test: the kubelet's folder, a scripted authority, the driver's process, and what a pod sees of it all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from csi_driver import DRIVER_NAME
from csi_driver._proto import csi_pb2, csi_pb2_grpc
from csi_driver.host import syscalls
from csi_driver.host.mountinfo import MountEntry, read_mounts
from csi_driver.rpc.errors import REASON_KEY
from tests.support.driver import Driver
from tests.support.kubelet import FakePod, Kubelet, node_stub
from tests.support.requirements import may_mount
from tests.support.scripted_authority import Script, ScriptedAuthority
from tests.support.waiting import until

FILES = {"root.crt", "site.crt", "site.key", "site.pem"}
_MS_SHARED = 1 << 20

Request = csi_pb2.NodePublishVolumeRequest


@dataclass(frozen=True)
class Failure:
    """How a call failed: the status, the reason in the metadata, and the text that the pod's event shows."""

    code: grpc.StatusCode
    reason: str
    text: str


async def failure_of(call: Awaitable[object]) -> Failure:
    """Awaits a call that must fail."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
        return Failure(error.code(), metadata.get(REASON_KEY, ""), error.details() or "")
    raise AssertionError("the call succeeded")


@dataclass(frozen=True)
class Shown:
    """The files of one volume as somebody sees them in a folder, read from one generation."""

    key: bytes
    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]
    generation: str

    @classmethod
    def at(cls, folder: Path) -> Shown:
        """Reads a folder; fails unless it holds exactly our four files, whole and fitting each other."""
        assert {path.name for path in folder.iterdir() if not path.name.startswith("..")} == FILES
        generation = str((folder / "..data").readlink())
        content = {name: (folder / generation / name).read_bytes() for name in FILES}
        chain = x509.load_pem_x509_certificates(content["site.crt"])
        public = load_pem_private_key(content["site.key"], None).public_key()
        assert _spki(public) == _spki(chain[0].public_key()), "key and certificate belong together"
        assert content["site.pem"] == content["site.key"] + content["site.crt"]
        roots = x509.load_pem_x509_certificates(content["root.crt"])
        return cls(content["site.key"], tuple(chain), tuple(roots), generation)

    @property
    def leaf(self) -> x509.Certificate:
        return self.chain[0]

    @property
    def serial(self) -> int:
        return self.leaf.serial_number

    @property
    def names(self) -> list[str]:
        """The subject alternative names."""
        extension = self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return [str(name.value) for name in extension.value]


def _spki(key: Any) -> bytes:
    spki: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return spki


class Node:
    """What a test holds: it makes requests as the kubelet would, sends them, and looks at what became of them."""

    def __init__(self, folder: Path, kubelet: Kubelet, authority: ScriptedAuthority, driver: Driver) -> None:
        self.folder = folder
        self.kubelet = kubelet
        self.authority = authority
        self.driver = driver
        self._requests: list[Request] = []
        self._channel = kubelet.channel()

    real_mounts = may_mount()

    @property
    def script(self) -> Script:
        return self.authority.script

    @property
    def stub(self) -> csi_pb2_grpc.NodeAsyncStub:
        return node_stub(self._channel)

    @property
    def channel(self) -> grpc.aio.Channel:
        return self._channel

    # What the kubelet does.

    def request(
        self, pod: FakePod | None = None, attributes: Mapping[str, str] | None = None, **options: Any
    ) -> Request:
        """A publish call for a pod (a new one by default); the volume is cleared away after the test."""
        request = self.kubelet.publish_request(pod or FakePod(), attributes, **options)
        self._requests.append(request)
        return request

    async def publish(self, request: Request, timeout: float = 20.0) -> None:  # noqa: ASYNC109  # the call's own deadline, as the kubelet sets it
        await self.stub.NodePublishVolume(request, timeout=timeout, wait_for_ready=True)

    async def published(
        self, pod: FakePod | None = None, attributes: Mapping[str, str] | None = None, **options: Any
    ) -> Request:
        """Publishes a volume and gives the request that did it."""
        request = self.request(pod, attributes, **options)
        await self.publish(request)
        return request

    async def unpublish(self, request: Request) -> None:
        unpublish = self.kubelet.unpublish_request(request)
        await self.stub.NodeUnpublishVolume(unpublish, timeout=20.0, wait_for_ready=True)

    async def health(self, request: Request) -> list[tuple[int, str, str]]:
        """Status, reason and message of all that is wrong with a volume."""
        question = csi_pb2.NodeGetVolumeHealthRequest(
            volume_id=request.volume_id, volume_publish_path=request.target_path
        )
        answer = await self.stub.NodeGetVolumeHealth(question, timeout=20.0, wait_for_ready=True)
        assert answer.volume_health.volume_id == request.volume_id
        return [(entry.status, entry.reason, entry.message) for entry in answer.volume_health.health_statuses]

    def unmount(self, request: Request) -> None:
        """Takes the mount from the pod, behind the driver's back; needs root."""
        self.unmount_path(request.target_path)

    @staticmethod
    def unmount_path(path: str) -> None:
        syscalls.unmount(path, syscalls.MNT_DETACH)

    def forget_pod(self, request: Request) -> None:
        """The pod ends without an unpublish call: its mount and its folder go."""
        if self.real_mounts:
            self.unmount(request)
        shutil.rmtree(self.pod_dir(request))
        self._requests.remove(request)

    async def watched(self) -> None:
        """Waits until the driver follows the roots; after an outage its next try may be half a minute away."""
        await until(lambda: self.authority.watchers, "the driver follows the roots", patience_s=60.0)

    async def restart(self) -> None:
        """SIGKILL, then a new process."""
        await self.driver.kill()
        await self.driver.start()

    # What there is to see.

    def target(self, request: Request, *name: str) -> Path:
        """Where the volume is to be shown, or a file there."""
        return Path(request.target_path, *name)

    def shown(self, request: Request) -> Shown:
        """What the pod sees."""
        return Shown.at(self.target(request))

    def pod_dir(self, request: Request) -> Path:
        return self.kubelet.root / "pods" / request.volume_context["csi.storage.k8s.io/pod.uid"]

    @property
    def volumes(self) -> Path:
        return self.kubelet.root / "plugins" / DRIVER_NAME / "volumes"

    def volume_dir(self, request: Request) -> Path:
        return self.volumes / request.volume_id

    def record(self, request: Request) -> dict[str, Any]:
        """The volume's record."""
        record: dict[str, Any] = json.loads((self.volume_dir(request) / "record.json").read_text())
        return record

    def state(self, request: Request) -> dict[str, tuple[int, int, int]]:
        """Inode and times of everything in the volume: equal before and after means that nothing was written."""
        found = {}
        for path in sorted(self.volume_dir(request).rglob("*")):
            stat = path.lstat()
            found[str(path)] = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
        return found

    def mounts(self, below: Path | str) -> list[MountEntry]:
        """The mounts at or below a path, the kubelet's own folder not among them."""
        root, wanted = os.path.realpath(self.kubelet.root), os.path.realpath(below)
        found = (mount for mount in read_mounts() if mount.point == wanted or mount.point.startswith(f"{wanted}/"))
        return [mount for mount in found if mount.point != root]

    def assert_nothing_of(self, request: Request) -> None:
        """No mount, folder or record of the volume is there: neither half nor whole."""
        assert not os.path.lexists(request.target_path), "the target is there"
        assert not self.volume_dir(request).exists(), "the volume's folder is there"
        assert self.mounts(self.pod_dir(request)) == []
        assert self.mounts(self.volume_dir(request)) == []

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 for one that is not there."""
        status, page = self.driver.get("/metrics")
        assert status == 200
        wanted = name + ("{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else "")
        return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.rpartition(" ")[0] == wanted)

    # Between tests.

    async def reset(self) -> None:
        """A well-behaved authority and a running driver, whatever the test before did to them."""
        self.authority.script = Script()
        if not self.authority.serving:
            await self.authority.start()
        if not self.driver.running:
            await self.driver.start()

    async def clear(self) -> None:
        """Unpublishes all that the test published, ends its pods, and holds the node to having nothing left."""
        await self.reset()
        for request in self._requests:
            await self.unpublish(request)
            shutil.rmtree(self.pod_dir(request), ignore_errors=True)
        self._requests.clear()
        left = [path.name for path in self.volumes.iterdir()] if self.volumes.exists() else []
        assert left == [], "volumes are left after all were unpublished"
        assert self.mounts(self.kubelet.root) == []

    async def close(self) -> None:
        await self._channel.close()


@contextmanager
def kubelet_root() -> Iterator[Path]:
    """A short path (a unix socket's has 107 bytes); where it may be, a file system of its own that spreads its mounts.

    It has few inodes, so that a test can fill it.
    """
    folder = Path(tempfile.mkdtemp(prefix="cm-"))
    root = folder / "kubelet"
    root.mkdir()
    try:
        if may_mount():
            syscalls.mount("kubelet", str(root), "tmpfs", 0, "size=16m,nr_inodes=2000,mode=0755")
            syscalls.mount(None, str(root), None, _MS_SHARED)
        yield root
    finally:
        real = os.path.realpath(root)
        for mount in reversed([mount for mount in read_mounts() if f"{mount.point}/".startswith(f"{real}/")]):
            syscalls.unmount(mount.point, syscalls.MNT_DETACH)
        shutil.rmtree(folder)


@asynccontextmanager
async def running_node(within: Sequence[str] = ()) -> AsyncIterator[Node]:
    """A node with its driver running."""
    with kubelet_root() as root:
        folder = root.parent
        kubelet = Kubelet(root)
        async with ScriptedAuthority(folder) as authority:
            log, address = folder / "driver.log", authority.address
            driver = Driver(kubelet, address, authority.root_file, authority.token_file, log, within=within)
            async with driver:
                node = Node(folder, kubelet, authority, driver)
                try:
                    yield node
                finally:
                    await node.close()
