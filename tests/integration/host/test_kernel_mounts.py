"""Single mounts, by both ways, as the kernel shows them."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.host import syscalls
from csi_driver.host.mounts import KernelMounts
from tests.integration.host.conftest import mount_stranger, mounts_at, mounts_below

pytestmark = pytest.mark.root

SIZE, INODES = 1 << 20, 128
HARMLESS = {"nosuid", "nodev", "noexec"}


@pytest.fixture
def source(kubelet: Path, mounts: KernelMounts) -> Path:
    """A folder in a tmpfs of ours."""
    point = kubelet / "volume"
    point.mkdir()
    mounts.make_tmpfs(point, SIZE, INODES)
    (point / "files").mkdir()
    (point / "files" / "a").write_text("shown")
    return point / "files"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count


def test_a_tmpfs_is_small_closed_and_harmless(source: Path) -> None:
    """Only root enters it, no program runs from it, no device works in it, and it is known as ours by its source."""
    (mount,) = mounts_at(source.parent)
    assert (mount.fs_type, mount.source) == ("tmpfs", "certmount")
    assert mount.options >= HARMLESS | {"rw"}
    assert mount.super_options >= {"size=1024k", "nr_inodes=128", "mode=700"}
    assert source.parent.stat().st_mode & 0o7777 == 0o700


def test_a_tmpfs_is_never_swapped(source: Path) -> None:
    """Keys do not get to a disk by swapping, where the kernel can promise it (Linux 6.4)."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (6, 4):
        pytest.skip("this kernel has no noswap for tmpfs")
    assert "noswap" in mounts_at(source.parent)[0].super_options


def test_the_size_limits_hold(source: Path) -> None:
    """More bytes or more files than allowed do not fit, so one volume can't eat the node's memory."""
    with pytest.raises(OSError, match="No space left") as caught:
        (source / "large").write_bytes(b"x" * (SIZE + 1))
    assert caught.value.errno == errno.ENOSPC
    (source / "large").unlink()
    fill = (source / str(number) for number in range(INODES))
    with pytest.raises(OSError, match="No space left"):
        list(map(Path.touch, fill))


def test_a_bind_is_read_only_and_harmless(mounts: KernelMounts, source: Path, target: Path) -> None:
    """Even root can't write through the target, while the driver writes beside it and is seen at once."""
    target.mkdir()
    mounts.bind_read_only(source, target)
    (mount,) = mounts_at(target)
    assert mount.options >= HARMLESS | {"ro"}
    assert (mount.source, mount.root) == ("certmount", "/files")
    for write in ((target / "b").touch, partial((target / "a").write_text, "x"), (target / "a").unlink):
        with pytest.raises(OSError, match="Read-only file system"):
            write()
    (source / "b").write_text("later")
    assert (target / "b").read_text() == "later"
    assert mounts.is_bound(source, target)


def test_mounts_never_stack(mounts: KernelMounts, source: Path, target: Path) -> None:
    """A mount point is refused, whoever's mount is there: a republish can't grow the mount table."""
    target.mkdir()
    mounts.bind_read_only(source, target)
    before, descriptors = mounts_below(target.parent), open_descriptors()
    for again in (partial(mounts.bind_read_only, source, target), partial(mounts.make_tmpfs, target, SIZE, INODES)):
        with pytest.raises(CertmountError, match="is a mount point already") as caught:
            again()
        assert caught.value.reason is Reason.INVALID_TARGET_PATH
    assert mounts_below(target.parent) == before
    assert open_descriptors() == descriptors


def test_a_symbolic_link_is_not_followed(mounts: KernelMounts, source: Path, target: Path, tmp_path: Path) -> None:
    """A link at the target can't lead a mount elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target.symlink_to(elsewhere)
    for mount in (partial(mounts.bind_read_only, source, target), partial(mounts.make_tmpfs, target, SIZE, INODES)):
        with pytest.raises(CertmountError, match="Not a directory") as caught:
            mount()
        assert caught.value.reason is Reason.MOUNT_FAILED
    assert mounts_below(elsewhere) == []


def test_a_failed_bind_names_path_and_cause(mounts: KernelMounts, source: Path, target: Path) -> None:
    """A file or nothing at the target, or a source that is gone: the kernel's words, the path, and nothing left open."""
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


def test_unmounting_takes_the_whole_stack_of_ours(mounts: KernelMounts, source: Path, target: Path) -> None:
    """However many of ours were piled up by an older driver, none is left; again, and for nothing at all: no error."""
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


def test_a_strangers_mount_is_never_unmounted(mounts: KernelMounts, source: Path, target: Path) -> None:
    """What is not ours stays; when it hides one of ours, that is said, as the key under it would stay mounted."""
    target.mkdir()
    mount_stranger(target)
    mounts.unmount(target)
    assert [mount.source for mount in mounts_at(target)] == ["stranger"]
    syscalls.unmount(str(target), 0)
    mounts.bind_read_only(source, target)
    mount_stranger(target)
    assert not mounts.is_bound(source, target)
    with pytest.raises(CertmountError, match="a tmpfs of 'stranger' is mounted over our mount") as caught:
        mounts.unmount(target)
    assert caught.value.reason is Reason.MOUNT_FAILED
    assert len(mounts_at(target)) == 2


def test_another_file_system_of_our_name_is_not_ours(mounts: KernelMounts, target: Path) -> None:
    """The source alone is a word anyone may use: only a tmpfs of that source is taken for ours."""
    target.mkdir()
    syscalls.mount("certmount", str(target), "proc", 0)
    mounts.unmount(target)
    assert len(mounts_at(target)) == 1
    assert mounts.survey([target]) == {}


def test_a_mount_in_use_is_unmounted_all_the_same(mounts: KernelMounts, source: Path, target: Path) -> None:
    """A process that still reads keeps what it has open, and the pod's deletion does not wait for it."""
    target.mkdir()
    mounts.bind_read_only(source, target)
    with (target / "a").open() as file:
        mounts.unmount(target)
        assert mounts_at(target) == []
        assert file.read() == "shown"


def test_unmounting_does_not_follow_a_link(mounts: KernelMounts, source: Path, target: Path, tmp_path: Path) -> None:
    """A link to a live mount is no mount."""
    target.mkdir()
    mounts.bind_read_only(source, target)
    link = tmp_path / "link"
    link.symlink_to(target)
    mounts.unmount(link)
    assert mounts.is_bound(source, target)


def test_only_the_same_folder_shown_read_only_is_bound(mounts: KernelMounts, source: Path, target: Path) -> None:
    """Nothing, an empty folder, a link, another volume, or a bind left writable by a crash: none of them is healthy."""
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


def test_a_survey_tells_mounted_and_shown(mounts: KernelMounts, source: Path, target: Path, kubelet: Path) -> None:
    """Of many folders, those with our tmpfs are found, also through a linked path, and whether a target shows them."""
    plain, strange, link = kubelet / "plain", kubelet / "strange", kubelet / "link"
    plain.mkdir()
    strange.mkdir()
    mount_stranger(strange)
    link.symlink_to(kubelet)
    point = source.parent
    assert mounts.survey([plain, strange, point]) == {point: False}
    assert mounts.survey([link / point.name]) == {link / point.name: False}
    target.mkdir()
    mounts.bind_read_only(source, target)
    assert mounts.survey([plain, point]) == {point: True}
