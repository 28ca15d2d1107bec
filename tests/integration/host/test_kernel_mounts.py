"""Single mounts of both implementations, as the kernel shows them."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest

from csi_driver.core.errors import CertmountError
from csi_driver.host import syscalls
from csi_driver.host.mounts import KernelMounts
from tests.integration.host.conftest import mount_foreign, mounts_at, mounts_below

pytestmark = pytest.mark.root

SIZE, INODES = 1 << 20, 128
RESTRICTED = {"nosuid", "nodev", "noexec"}


@pytest.fixture
def source(kubelet: Path, mounts: KernelMounts) -> Path:
    point = kubelet / "volume"
    point.mkdir()
    mounts.make_tmpfs(point, SIZE, INODES)
    (point / "files").mkdir()
    (point / "files" / "a").write_text("shown")
    return point / "files"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count


def test_tmpfs_is_small_private_and_restricted(source: Path) -> None:
    (mount,) = mounts_at(source.parent)
    assert (mount.fs_type, mount.source) == ("tmpfs", "certmount")
    assert mount.options >= RESTRICTED | {"rw"}
    assert mount.super_options >= {"size=1024k", "nr_inodes=128", "mode=700"}
    assert source.parent.stat().st_mode & 0o7777 == 0o700


def test_tmpfs_is_never_swapped(source: Path) -> None:
    """If the kernel supports noswap (Linux 6.4), keys are never written to a disk."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (6, 4):
        pytest.skip("this kernel does not support noswap")
    assert "noswap" in mounts_at(source.parent)[0].super_options


def test_size_and_inode_limits_are_enforced(source: Path) -> None:
    """A volume cannot use the node's memory."""
    with pytest.raises(OSError, match="No space left") as caught:
        (source / "large").write_bytes(b"x" * (SIZE + 1))
    assert caught.value.errno == errno.ENOSPC
    (source / "large").unlink()
    fill = (source / str(number) for number in range(INODES))
    with pytest.raises(OSError, match="No space left"):
        list(map(Path.touch, fill))


def test_bind_is_read_only_and_restricted(mounts: KernelMounts, source: Path, target: Path) -> None:
    target.mkdir()
    mounts.bind_read_only(source, target)
    (mount,) = mounts_at(target)
    assert mount.options >= RESTRICTED | {"ro"}
    assert (mount.source, mount.root) == ("certmount", "/files")
    for write in ((target / "b").touch, partial((target / "a").write_text, "x"), (target / "a").unlink):
        with pytest.raises(OSError, match="Read-only file system"):
            write()
    (source / "b").write_text("later")
    assert (target / "b").read_text() == "later"
    assert mounts.is_bound(source, target)


def test_mount_points_are_rejected(mounts: KernelMounts, source: Path, target: Path) -> None:
    """So a republish never adds a mount."""
    target.mkdir()
    mounts.bind_read_only(source, target)
    before, descriptors = mounts_below(target.parent), open_descriptors()
    for again in (partial(mounts.bind_read_only, source, target), partial(mounts.make_tmpfs, target, SIZE, INODES)):
        with pytest.raises(CertmountError, match=r"^InvalidTargetPath: .*is already a mount point"):
            again()
    assert mounts_below(target.parent) == before
    assert open_descriptors() == descriptors


def test_symbolic_link_is_not_followed(mounts: KernelMounts, source: Path, target: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target.symlink_to(elsewhere)
    for mount in (partial(mounts.bind_read_only, source, target), partial(mounts.make_tmpfs, target, SIZE, INODES)):
        with pytest.raises(CertmountError, match=r"^MountFailed: .*Not a directory"):
            mount()
    assert mounts_below(elsewhere) == []


def test_failed_bind_reports_path_and_cause(mounts: KernelMounts, source: Path, target: Path) -> None:
    descriptors, before = open_descriptors(), len(mounts_below(source.parent))
    with pytest.raises(CertmountError, match=f"target_path: could not bind {source} at {target}: No such file"):
        mounts.bind_read_only(source, target)
    target.write_text("file")
    with pytest.raises(CertmountError, match="Not a directory"):
        mounts.bind_read_only(source, target)
    target.unlink()
    target.mkdir()
    with pytest.raises(CertmountError, match="No such file or directory"):
        mounts.bind_read_only(source.with_name("gone"), target)
    assert mounts_at(target) == []
    assert open_descriptors() == descriptors
    assert len(mounts_below(source.parent)) == before
    assert [path.name for path in source.parent.iterdir()] == ["files"]


def test_unmount_removes_all_stacked_mounts_of_the_driver(mounts: KernelMounts, source: Path, target: Path) -> None:
    target.mkdir()
    for _ in range(3):
        syscalls.mount(str(source), str(target), None, syscalls.MS_BIND)
    assert len(mounts_at(target)) == 3
    for _ in range(2):
        mounts.unmount(target)
        assert mounts_at(target) == []
    mounts.unmount(target / "nothing" / "here")
    (target / "file").touch()
    mounts.unmount(target / "file" / "x")


def test_foreign_mount_is_never_unmounted(mounts: KernelMounts, source: Path, target: Path) -> None:
    """If it covers a mount of the driver, the call fails: the key would stay mounted."""
    target.mkdir()
    mount_foreign(target)
    mounts.unmount(target)
    assert [mount.source for mount in mounts_at(target)] == ["foreign"]
    syscalls.unmount(str(target), 0)
    mounts.bind_read_only(source, target)
    mount_foreign(target)
    assert not mounts.is_bound(source, target)
    with pytest.raises(CertmountError, match=r"^MountFailed: .*a tmpfs of 'foreign' covers the driver's mount"):
        mounts.unmount(target)
    assert len(mounts_at(target)) == 2


def test_other_file_system_with_the_same_source_is_foreign(mounts: KernelMounts, target: Path) -> None:
    target.mkdir()
    syscalls.mount("certmount", str(target), "proc", 0)
    mounts.unmount(target)
    assert len(mounts_at(target)) == 1
    assert mounts.survey([target]) == {}


def test_mount_in_use_is_unmounted(mounts: KernelMounts, source: Path, target: Path) -> None:
    """Open files stay readable, and the pod's deletion does not wait."""
    target.mkdir()
    mounts.bind_read_only(source, target)
    with (target / "a").open() as file:
        mounts.unmount(target)
        assert mounts_at(target) == []
        assert file.read() == "shown"


def test_unmount_does_not_follow_a_link(mounts: KernelMounts, source: Path, target: Path, tmp_path: Path) -> None:
    target.mkdir()
    mounts.bind_read_only(source, target)
    link = tmp_path / "link"
    link.symlink_to(target)
    mounts.unmount(link)
    assert mounts.is_bound(source, target)


def test_only_a_read_only_bind_of_the_directory_is_healthy(mounts: KernelMounts, source: Path, target: Path) -> None:
    assert not mounts.is_bound(source, target)
    target.symlink_to(source)
    assert not mounts.is_bound(source, target)
    target.unlink()
    target.mkdir()
    assert not mounts.is_bound(source, target)
    syscalls.mount(str(source), str(target), None, syscalls.MS_BIND)
    assert not mounts.is_bound(source, target)
    mounts.unmount(target)
    mounts.bind_read_only(source, target)
    assert mounts.is_bound(source, target)
    other = source.parent.with_name("other")
    other.mkdir()
    mounts.make_tmpfs(other, SIZE, INODES)
    (other / "files").mkdir()
    assert not mounts.is_bound(other / "files", target)
    assert not mounts.is_bound(source.with_name("gone"), target)


def test_survey_returns_mounts_and_binds(mounts: KernelMounts, source: Path, target: Path, kubelet: Path) -> None:
    plain, strange, link = kubelet / "plain", kubelet / "strange", kubelet / "link"
    plain.mkdir()
    strange.mkdir()
    mount_foreign(strange)
    link.symlink_to(kubelet)
    point = source.parent
    assert mounts.survey([plain, strange, point]) == {point: False}
    assert mounts.survey([link / point.name]) == {link / point.name: False}
    target.mkdir()
    mounts.bind_read_only(source, target)
    assert mounts.survey([plain, point]) == {point: True}
