"""A kubelet directory for mounts, which are removed after each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.host import syscalls
from csi_driver.host.mountinfo import MountEntry, read_mounts
from csi_driver.host.mounts import KernelMounts
from csi_driver.host.volume_store import VolumeStore
from tests.unit.host.samples import POD_UID

MS_SHARED = 1 << 20


def mounts_at(point: Path) -> list[MountEntry]:
    return [mount for mount in read_mounts() if mount.point == os.path.realpath(point)]


def mounts_below(directory: Path) -> list[MountEntry]:
    real = os.path.realpath(directory)
    return [mount for mount in read_mounts() if mount.point == real or mount.point.startswith(f"{real}/")]


def mount_foreign(point: Path) -> None:
    syscalls.mount("foreign", str(point), "tmpfs", 0, "size=64k")


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "kubelet"
    for name in ("plugins_registry", "pods"):
        (root / name).mkdir(parents=True)
    yield root
    for mount in reversed(mounts_below(tmp_path)):
        syscalls.unmount(mount.point, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)


@pytest.fixture
def shared_kubelet(kubelet: Path) -> Path:
    """Like a hostPath with Bidirectional propagation: mounts propagate to other namespaces."""
    syscalls.mount(str(kubelet), str(kubelet), None, syscalls.MS_BIND)
    syscalls.mount(None, str(kubelet), None, MS_SHARED)
    return kubelet


@pytest.fixture
def target(kubelet: Path) -> Path:
    path = kubelet / "pods" / POD_UID / "volumes" / "kubernetes.io~csi" / "tls" / "mount"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture(params=[True, False], ids=["detached", "before-5.12"])
def mounts(request: pytest.FixtureRequest) -> KernelMounts:
    return KernelMounts(detached=request.param)


@pytest.fixture
def root(kubelet: Path) -> Path:
    return kubelet / "plugins" / "csi.certmount.dev" / "volumes"


@pytest.fixture
def store(root: Path, kubelet: Path) -> VolumeStore:
    return VolumeStore(root, kubelet, KernelMounts())
