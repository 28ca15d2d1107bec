"""Volumes with real mounts, and their failures."""

from __future__ import annotations

import os
import stat
import subprocess
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.host import mounts, syscalls
from csi_driver.host.directories import open_descriptor
from csi_driver.host.generations import VolumeFile, read_generation, write_generation
from csi_driver.host.mounts import KernelMounts
from csi_driver.host.volume_store import VolumeStore
from tests.integration.host.conftest import mount_foreign, mounts_at, mounts_below
from tests.unit.host.samples import POD_UID, VOLUME_ID, pair, record

pytestmark = pytest.mark.root


def publish(store: VolumeStore, target: Path, volume_id: str = VOLUME_ID) -> None:
    store.create(volume_id)
    write_generation(store.files_dir(volume_id), pair(1), "1")
    store.write_record(record(str(target), volume_id=volume_id))
    store.bind(volume_id, target)


def fill(directory: Path) -> Path:
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        deque(map(file.write, repeat(b"x" * 4096)), maxlen=0)
    return filler


def test_publish_renew_and_unpublish_leave_nothing(store: VolumeStore, root: Path, target: Path, kubelet: Path) -> None:
    for _ in range(3):
        publish(store, target)
    store.create(VOLUME_ID)  # as a driver that was killed: nothing is mounted over the files
    assert read_generation(target)["site.crt"] == b"1 "
    assert store.is_healthy(VOLUME_ID, target)
    assert [len(mounts_at(point)) for point in (target, root / VOLUME_ID)] == [1, 1]
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    write_generation(store.files_dir(VOLUME_ID), pair(2), "2")
    assert read_generation(target)["site.key"] == b"2 "
    for _ in range(2):
        store.unbind(target)
        store.remove(VOLUME_ID)
        assert mounts_below(kubelet) == []
        assert list(root.iterdir()) == list(target.parent.iterdir()) == []


def test_target_directory_has_the_kubelets_mode(store: VolumeStore, target: Path) -> None:
    before = os.umask(0o077)
    try:
        publish(store, target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    syscalls.unmount(str(target), 0)
    assert stat.S_IMODE(target.stat().st_mode) == 0o750


def test_full_volume_keeps_its_files(store: VolumeStore, root: Path, target: Path) -> None:
    publish(store, target)
    big = pair(2, size=20_000)
    filler = fill(root / VOLUME_ID)
    with pytest.raises(CertmountError, match=r"^NoSpace: .*No space left on device"):
        write_generation(store.files_dir(VOLUME_ID), big, "2")
    assert read_generation(target) == {"site.crt": b"1 ", "site.key": b"1 "}
    assert sorted(path.name for path in target.iterdir()) == ["..1", "..data", "site.crt", "site.key"]
    with pytest.raises(CertmountError, match=r"^NoSpace: "):
        store.write_record(record(str(target), pod_name="other"))
    assert [found.pod_name for found in store.scan().records] == ["hello-0"]
    filler.unlink()
    write_generation(store.files_dir(VOLUME_ID), big, "2")
    assert read_generation(target)["site.key"] == big[1].content.reveal()


def test_partial_writes_never_become_visible(store: VolumeStore, root: Path, target: Path) -> None:
    """With some space, the kernel accepts only a part of a write."""
    publish(store, target)
    big = pair(2, size=10_000)
    filler, failures = fill(root / VOLUME_ID), 0
    while read_generation(target)["site.crt"] == b"1 ":
        os.truncate(filler, filler.stat().st_size - 4096)
        try:
            write_generation(store.files_dir(VOLUME_ID), big, "2")
        except CertmountError as error:
            assert error.reason is Reason.NO_SPACE
            failures += 1
            assert read_generation(target) == {"site.crt": b"1 ", "site.key": b"1 "}
    assert failures > 5
    assert read_generation(target) == {file.name: file.content.reveal() for file in big}


def test_volume_without_free_inodes_keeps_its_files(store: VolumeStore, root: Path, target: Path) -> None:
    publish(store, target)
    hoard = root / VOLUME_ID / "hoard"
    hoard.mkdir()
    free = store.usage(VOLUME_ID).f_favail
    for number in range(free):
        (hoard / str(number)).touch()
    for spare in range(4):
        with pytest.raises(CertmountError, match=r"^NoSpace: "):
            write_generation(store.files_dir(VOLUME_ID), [*pair(2), VolumeFile("new", Secret(b""), 0o644, None)], "2")
        assert read_generation(target) == {"site.crt": b"1 ", "site.key": b"1 "}
        assert sorted(path.name for path in target.iterdir()) == ["..1", "..data", "site.crt", "site.key"]
        (hoard / str(spare)).unlink()


@pytest.mark.parametrize("group, readable", [(2000, True), (3000, False)])
def test_only_the_group_reads_the_key(store: VolumeStore, target: Path, group: int, readable: bool) -> None:
    store.create(VOLUME_ID)
    write_generation(store.files_dir(VOLUME_ID), [VolumeFile("site.key", Secret(b"key"), 0o440, 2000)], "1")
    store.bind(VOLUME_ID, target)
    found = (target / "site.key").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 2000, 0o440)
    directory = os.open(target, os.O_PATH)  # as in a pod, where all directories above the volume are accessible
    try:
        drop = ["setpriv", "--reuid=1000", f"--regid={group}", "--clear-groups"]
        done = subprocess.run(
            [*drop, "cat", f"/proc/self/fd/{directory}/site.key"],
            pass_fds=[directory],
            capture_output=True,
            check=False,
        )
    finally:
        os.close(directory)
    assert done.stdout == (b"key" if readable else b""), done.stderr


def test_bind_of_an_unmounted_tmpfs_is_replaced(store: VolumeStore, root: Path, target: Path) -> None:
    publish(store, target)
    syscalls.unmount(str(root / VOLUME_ID), syscalls.MNT_DETACH)
    assert not store.is_healthy(VOLUME_ID, target)
    store.create(VOLUME_ID)
    write_generation(store.files_dir(VOLUME_ID), pair(2), "2")
    store.bind(VOLUME_ID, target)
    assert store.is_healthy(VOLUME_ID, target)
    assert len(mounts_at(target)) == 1
    assert (target / "site.crt").read_text() == "2 "


def test_unmounted_target_is_bound_again(store: VolumeStore, target: Path) -> None:
    publish(store, target)
    syscalls.unmount(str(target), 0)
    target.rmdir()
    assert not store.is_healthy(VOLUME_ID, target)
    store.bind(VOLUME_ID, target)
    assert store.is_healthy(VOLUME_ID, target)


def test_foreign_mount_at_the_target_stays(store: VolumeStore, target: Path) -> None:
    target.mkdir()
    mount_foreign(target)
    (target / "file").write_text("mine")
    with pytest.raises(CertmountError, match=r"^InvalidTargetPath: .*umount"):
        publish(store, target)
    store.unbind(target)
    assert len(mounts_at(target)) == 1
    assert (target / "file").read_text() == "mine"


@pytest.mark.parametrize("inside", ["", "inside"])
def test_foreign_mount_in_a_volume_directory_is_not_emptied(store: VolumeStore, root: Path, inside: str) -> None:
    point = root / VOLUME_ID / inside
    point.mkdir(parents=True)
    mount_foreign(point)
    (point / "file").write_text("mine")
    (quarantined,) = store.scan().quarantined
    assert quarantined.key == VOLUME_ID
    assert "Device or resource busy" in quarantined.reason
    for act in (store.create, store.remove):
        with pytest.raises(CertmountError, match="Device or resource busy"):
            act(VOLUME_ID)
    assert (point / "file").read_text() == "mine"


def test_link_at_the_target_is_rejected(store: VolumeStore, target: Path, tmp_path: Path) -> None:
    target.symlink_to(tmp_path)
    with pytest.raises(CertmountError, match=r"^InvalidTargetPath: "):
        publish(store, target)
    assert target.is_symlink()
    assert [found.volume_id for found in store.scan().records] == [VOLUME_ID]


def test_removed_volume_leaves_no_key_in_copies_of_its_mount(store: VolumeStore, target: Path, kubelet: Path) -> None:
    """In a mount namespace without propagation, for example."""
    publish(store, target)
    leak = kubelet / "leak"
    leak.mkdir()
    syscalls.mount(str(target), str(leak), None, syscalls.MS_BIND)
    store.unbind(target)
    assert (leak / "site.key").read_text() == "1 "
    store.remove(VOLUME_ID)
    assert len(mounts_at(leak)) == 1
    assert list(leak.iterdir()) == []


def test_volume_of_an_interrupted_publish_leaves_no_key_in_copies_of_its_mount(store: VolumeStore) -> None:
    store.create(VOLUME_ID)
    write_generation(store.files_dir(VOLUME_ID), pair(1), "1")
    with open_descriptor(store.files_dir(VOLUME_ID), os.O_RDONLY | os.O_DIRECTORY) as copy:
        assert os.listdir(copy) != []  # noqa: PTH208  # of a descriptor
        assert store.scan().dropped == (VOLUME_ID,)
        assert os.listdir(copy) == []  # noqa: PTH208


def test_volume_that_the_mount_table_omits_is_kept(
    store: VolumeStore, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 5.8, a read of the table skips a mount if another process removes an earlier one meanwhile."""
    publish(store, target)
    monkeypatch.setattr(mounts, "read_mounts", lambda: iter(()))
    assert store.scan().records == (record(str(target)),)
    assert read_generation(target)["site.key"] == b"1 "


def test_scan_classifies_all_volumes(store: VolumeStore, root: Path, target: Path, kubelet: Path) -> None:
    publish(store, target)
    damaged = target.parent.with_name("damaged") / "mount"
    damaged.parent.mkdir()
    publish(store, damaged, "damaged")
    (root / "damaged" / "record.json").write_bytes(b'{"version":1,')
    store.create("orphan")
    orphan = record(volume_id="orphan", pod_uid="gone")
    store.write_record(orphan)
    store.create("half-made")
    (root / "rebooted").mkdir()
    scan = store.scan()
    assert scan.records == (record(str(target)),)
    assert scan.orphans == (orphan,)
    assert [entry.key for entry in scan.quarantined] == ["damaged"]
    assert "record.json: " in scan.quarantined[0].reason
    assert sorted(scan.dropped) == ["half-made", "rebooted"]
    assert sorted(path.name for path in root.iterdir()) == sorted([VOLUME_ID, "damaged", "orphan"])
    assert (damaged / "site.crt").read_text() == "1 "
    assert (root / "damaged" / "record.json.corrupt").read_bytes() == b'{"version":1,'
    publish(store, damaged, "damaged")
    assert store.scan().quarantined == ()
    assert len(mounts_below(kubelet)) == 5


def test_usage_is_that_of_the_volume(store: VolumeStore, target: Path) -> None:
    publish(store, target)
    before = store.usage(VOLUME_ID)
    assert (before.f_blocks * before.f_frsize, before.f_files) == (1 << 20, 128)
    write_generation(store.files_dir(VOLUME_ID), pair(2, size=20_000), "2")
    after = store.usage(VOLUME_ID)
    pages = -(-len("2 " * 20_000) // 4096)
    assert (before.f_bfree - after.f_bfree) * after.f_frsize == 2 * pages * 4096
    assert after.f_bavail == after.f_bfree
    assert after.f_ffree == before.f_ffree - 3


def test_110_volumes_are_created_and_removed_concurrently(kubelet: Path, mounts: KernelMounts, root: Path) -> None:
    store = VolumeStore(root, kubelet, mounts)
    ids = [f"csi-{number:064x}" for number in range(110)]
    targets = {volume_id: kubelet / "pods" / POD_UID / volume_id / "mount" for volume_id in ids}

    def live(volume_id: str) -> None:
        target = targets[volume_id]
        target.parent.mkdir(parents=True)
        store.create(volume_id)
        write_generation(store.files_dir(volume_id), pair(int(volume_id[4:], 16)), "1")
        store.write_record(record(str(target), volume_id=volume_id))
        store.bind(volume_id, target)

    def die(volume_id: str) -> None:
        store.unbind(targets[volume_id])
        store.remove(volume_id)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(live, ids))
        assert all(store.is_healthy(volume_id, target) for volume_id, target in targets.items())
        shown = [(target / "site.key").read_text() for target in targets.values()]
        assert shown == [f"{number} " for number in range(110)]
        assert {found.volume_id for found in store.scan().records} == set(ids)
        assert len(mounts_below(kubelet)) == 220
        list(threads.map(die, ids))
    assert mounts_below(kubelet) == []
    assert list(root.iterdir()) == []
