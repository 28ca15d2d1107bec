"""A node under test: the kubelet directory, a scripted authority, the driver process, and what pods see."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
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
from tests.support.call_failures import CallFailure, failure_of
from tests.support.driver import Driver
from tests.support.kubelet import FakePod, Kubelet, node_stub
from tests.support.requirements import may_mount
from tests.support.scripted_authority import Script, ScriptedAuthority, TestCA
from tests.support.waiting import until

__all__ = ["CallFailure", "failure_of"]
FILES = {"generation.json", "root.crt", "site.crt", "site.key", "site.pem"}
_MS_SHARED = 1 << 20

Request = csi_pb2.NodePublishVolumeRequest
Attributes = Mapping[str, str] | None


@dataclass(frozen=True)
class Shown:
    """The files of one generation of a volume."""

    key: bytes
    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]
    generation: str

    @classmethod
    def at(cls, directory: Path) -> Shown:
        """Read a directory, which must contain exactly the four matching PEM files and their summary."""
        assert {path.name for path in directory.iterdir() if not path.name.startswith("..")} == FILES
        generation = str((directory / "..data").readlink())
        content = {name: (directory / generation / name).read_bytes() for name in FILES}
        chain = x509.load_pem_x509_certificates(content["site.crt"])
        public = load_pem_private_key(content["site.key"], None).public_key()
        assert _spki(public) == _spki(chain[0].public_key()), "key and certificate match"
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
        extension = self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return [str(name.value) for name in extension.value]


def _spki(key: Any) -> bytes:
    spki: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return spki


class Node:
    """Sends requests like the kubelet, and inspects the results."""

    def __init__(self, directory: Path, kubelet: Kubelet, authority: ScriptedAuthority, driver: Driver) -> None:
        self.directory = directory
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

    def request(self, pod: FakePod | None = None, attributes: Attributes = None, **options: Any) -> Request:
        """Return a publish call for a pod (by default a new one). The volume is removed after the test."""
        request = self.kubelet.publish_request(pod or FakePod(), attributes, **options)
        self._requests.append(request)
        return request

    async def publish(self, request: Request, timeout: float = 20.0) -> None:  # noqa: ASYNC109  # the deadline of the call
        await self.stub.NodePublishVolume(request, timeout=timeout, wait_for_ready=True)

    async def published(self, pod: FakePod | None = None, attributes: Attributes = None, **options: Any) -> Request:
        request = self.request(pod, attributes, **options)
        await self.publish(request)
        return request

    async def unpublish(self, request: Request) -> None:
        unpublish = self.kubelet.unpublish_request(request)
        await self.stub.NodeUnpublishVolume(unpublish, timeout=20.0, wait_for_ready=True)

    async def health(self, request: Request) -> list[tuple[int, str, str]]:
        """Return the status, reason and message of each health entry."""
        query = csi_pb2.NodeGetVolumeHealthRequest(volume_id=request.volume_id, volume_publish_path=request.target_path)
        answer = await self.stub.NodeGetVolumeHealth(query, timeout=20.0, wait_for_ready=True)
        assert answer.volume_health.volume_id == request.volume_id
        return [(entry.status, entry.reason, entry.message) for entry in answer.volume_health.health_statuses]

    def unmount(self, request: Request) -> None:
        self.unmount_path(request.target_path)

    @staticmethod
    def unmount_path(path: str) -> None:
        syscalls.unmount(path, syscalls.MNT_DETACH)

    def forget_pod(self, request: Request) -> None:
        if self.real_mounts:
            self.unmount(request)
        shutil.rmtree(self.pod_dir(request))
        self._requests.remove(request)

    async def watched(self) -> None:
        """Wait until the driver follows the trust stream. After an outage, its retry can take 30 s."""
        await until(lambda: self.authority.watchers, "the driver follows the roots", timeout_s=60.0)

    async def add_issuer(self, name: str, *, shared: bool) -> TestCA:
        """Add an external issuer at the authority, and wait until the driver knows it."""
        await self.watched()
        ca = await self.authority.add_external_issuer(name, shared=shared)
        generation = self.authority.sets[name].generation
        await until(
            lambda: self.authority.acknowledged_generation(name) >= generation, f"the driver knows {name}", 60.0
        )
        return ca

    async def restart(self) -> None:
        await self.driver.kill()
        await self.driver.start()

    def target(self, request: Request, *name: str) -> Path:
        return Path(request.target_path, *name)

    def shown(self, request: Request) -> Shown:
        return Shown.at(self.target(request))

    def pod_dir(self, request: Request) -> Path:
        return self.kubelet.root / "pods" / request.volume_context["csi.storage.k8s.io/pod.uid"]

    @property
    def volumes(self) -> Path:
        return self.kubelet.root / "plugins" / DRIVER_NAME / "volumes"

    def volume_dir(self, request: Request) -> Path:
        return self.volumes / request.volume_id

    def record(self, request: Request) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.volume_dir(request) / "record.json").read_text())
        return record

    def state(self, request: Request) -> dict[str, tuple[int, int, int]]:
        """Return inode and times of all files of the volume. If they do not change, nothing was written."""
        found = {}
        for path in sorted(self.volume_dir(request).rglob("*")):
            stat = path.lstat()
            found[str(path)] = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
        return found

    def mounts(self, below: Path | str) -> list[MountEntry]:
        """Return the mounts at or below a path, except the kubelet directory."""
        root, path = os.path.realpath(self.kubelet.root), os.path.realpath(below)
        found = (mount for mount in read_mounts() if mount.point == path or mount.point.startswith(f"{path}/"))
        return [mount for mount in found if mount.point != root]

    def assert_nothing_of(self, request: Request) -> None:
        assert not os.path.lexists(request.target_path), "the target exists"
        assert not self.volume_dir(request).exists(), "the volume directory exists"
        assert self.mounts(self.pod_dir(request)) == []
        assert self.mounts(self.volume_dir(request)) == []

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample of /metrics, or 0 if it does not exist. The driver sends a page again for some time, so poll it."""
        status, page = self.driver.get("/metrics")
        assert status == 200
        sample = name + ("{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else "")
        return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.rpartition(" ")[0] == sample)

    async def reset(self) -> None:
        self.authority.script = Script()
        if not self.authority.serving:
            await self.authority.start()
        if not self.driver.running:
            await self.driver.start()

    async def clear(self) -> None:
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


async def make_due(node: Node, request: Request) -> None:
    """Kill the driver, and make the renewal due at its next start."""
    await node.driver.kill()
    record = node.record(request)
    (node.volume_dir(request) / "record.json").write_text(json.dumps(record | {"renew_at": record["issued_at"]}))


@contextmanager
def kubelet_root() -> Iterator[Path]:
    """Create a kubelet directory with a short path, because a unix socket path has at most 107 bytes.

    As root, it is a shared mount with few inodes, so that a test can fill it.
    """
    directory = Path(tempfile.mkdtemp(prefix="cm-"))
    root = directory / "kubelet"
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
        shutil.rmtree(directory)


@asynccontextmanager
async def running_node(within: Sequence[str] = (), options: Sequence[str] = ()) -> AsyncIterator[Node]:
    with kubelet_root() as root:
        directory = root.parent
        kubelet = Kubelet(root)
        async with ScriptedAuthority(directory) as authority:
            log, address = directory / "driver.log", authority.address
            files = authority.root_file, authority.token_file
            driver = Driver(kubelet, address, *files, log, within=within, options=options)
            async with driver:
                node = Node(directory, kubelet, authority, driver)
                try:
                    yield node
                finally:
                    await node.close()
