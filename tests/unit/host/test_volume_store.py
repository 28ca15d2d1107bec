"""The volume directories, with directories and links instead of mounts."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from csi_driver.core.errors import CertmountError
from csi_driver.host.directory_mounts import DirectoryMounts
from csi_driver.host.generations import read_generation, write_generation
from csi_driver.host.os_errors import translate_os_errors
from csi_driver.host.volume_store import VolumeStore
from tests.unit.host.samples import POD_UID, VOLUME_ID, pair, record


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "pods" / POD_UID / "volumes" / "kubernetes.io~csi" / "tls" / "mount"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "plugins" / "csi.certmount.dev" / "volumes"


@pytest.fixture
def store(root: Path, tmp_path: Path) -> VolumeStore:
    return VolumeStore(root, tmp_path, DirectoryMounts())


@pytest.fixture
def published(store: VolumeStore, target: Path) -> Path:
    store.create(VOLUME_ID)
    write_generation(store.files_dir(VOLUME_ID), pair(1), "1")
    store.write_record(record(str(target)))
    store.bind(VOLUME_ID, target)
    return target


def test_publish_renew_and_unpublish_leave_nothing(store: VolumeStore, root: Path, published: Path) -> None:
    assert store.is_healthy(VOLUME_ID, published)
    assert (published / "site.crt").read_text() == "1 "
    write_generation(store.files_dir(VOLUME_ID), pair(2), "2")
    assert (published / "site.key").read_text() == "2 "
    store.create(VOLUME_ID)
    store.bind(VOLUME_ID, published)
    assert read_generation(published)["site.crt"] == b"2 "
    for _ in range(2):
        store.unbind(published)
        store.remove(VOLUME_ID)
        assert list(root.iterdir()) == []
        assert list(published.parent.iterdir()) == []
    assert not store.is_healthy(VOLUME_ID, published)


def test_volume_directories_and_records_are_private(store: VolumeStore, root: Path, published: Path) -> None:
    assert published.is_symlink()
    modes = {path: stat.S_IMODE((root / path).stat().st_mode) for path in (".", VOLUME_ID, f"{VOLUME_ID}/record.json")}
    assert modes == {".": 0o700, VOLUME_ID: 0o700, f"{VOLUME_ID}/record.json": 0o600}
    assert stat.S_IMODE(store.files_dir(VOLUME_ID).stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "volume_id", ["../../etc", "/etc", ".", "..", ".hidden", "a/b", "", "x" * 129, "ü", "a\n", "a b"]
)
def test_unsafe_volume_id_becomes_a_hash(store: VolumeStore, root: Path, volume_id: str) -> None:
    assert store.key(volume_id) == hashlib.sha256(volume_id.encode()).hexdigest()
    assert store.files_dir(volume_id).parent.parent == root


def test_kubelets_volume_id_is_the_directory_name(store: VolumeStore) -> None:
    """People find the directory by the ID in the kubelet's log."""
    assert store.key(VOLUME_ID) == VOLUME_ID
    assert store.key("x" * 128) == "x" * 128


def test_volume_without_files_is_not_bound(store: VolumeStore, target: Path) -> None:
    store.create(VOLUME_ID)
    with pytest.raises(CertmountError, match=r"^InternalError: "):
        store.bind(VOLUME_ID, target)
    assert not target.exists()


def test_failed_bind_removes_the_target_that_it_created(store: VolumeStore, target: Path) -> None:
    class Broken(DirectoryMounts):
        def bind_read_only(self, source: Path, target: Path) -> None:
            with translate_os_errors("target_path", f"bind {source} at", target):
                raise OSError(errno.EIO, "broken")

    store.create(VOLUME_ID)
    write_generation(store.files_dir(VOLUME_ID), pair(1), "1")
    broken = VolumeStore(store.files_dir(VOLUME_ID).parent.parent, target.parent, Broken())
    for exists in (False, True):
        if exists:
            target.mkdir()
        with pytest.raises(CertmountError, match="Input/output error"):
            broken.bind(VOLUME_ID, target)
        assert target.exists() == exists


def test_unbind_keeps_foreign_files(store: VolumeStore, published: Path, target: Path) -> None:
    store.unbind(published)
    target.write_text("mine")
    store.unbind(target)
    with pytest.raises(CertmountError, match=r"^InvalidTargetPath: "):
        store.bind(VOLUME_ID, target)
    assert target.read_text() == "mine"
    target.unlink()
    target.mkdir()
    (target / "file").write_text("mine")
    store.unbind(target)
    assert (target / "file").read_text() == "mine"
    (target / "file").unlink()
    store.unbind(target)
    assert not target.exists()
    target.symlink_to("/etc")
    store.unbind(target)
    assert target.is_symlink()


def test_dangling_link_of_a_lost_volume_is_replaced(store: VolumeStore, published: Path) -> None:
    store.remove(VOLUME_ID)
    assert not store.is_healthy(VOLUME_ID, published)
    store.create(VOLUME_ID)
    write_generation(store.files_dir(VOLUME_ID), pair(2), "2")
    store.bind(VOLUME_ID, published)
    assert (published / "site.crt").read_text() == "2 "


def test_leftover_directory_is_replaced(store: VolumeStore, root: Path) -> None:
    """A directory that is not mounted is from before a reboot."""
    (root / VOLUME_ID / "files" / "..1").mkdir(parents=True)
    (root / VOLUME_ID / "files" / "..1" / "site.key").write_text("old")
    store.create(VOLUME_ID)
    assert list(store.files_dir(VOLUME_ID).iterdir()) == []


def test_scan_classifies_all_volumes(store: VolumeStore, root: Path, published: Path, tmp_path: Path) -> None:
    assert VolumeStore(tmp_path / "new", tmp_path, DirectoryMounts()).scan().records == ()
    orphan = record(volume_id="orphan", pod_uid="gone")
    for volume_id in ("orphan", "corrupt", "nothing", "swapped"):
        store.create(volume_id)
    store.write_record(orphan)
    (root / "corrupt" / "record.json").write_bytes(record().to_json()[:40])
    (root / "swapped" / "record.json").write_bytes(record().to_json())
    (root / "lost" / "files").mkdir(parents=True)
    (root / "stray").write_text("a file")
    scan = store.scan()
    assert scan.records == (record(str(published)),)
    assert scan.orphans == (orphan,)
    assert {entry.key: entry.reason for entry in scan.quarantined} == {
        "corrupt": "record.json: record: is not JSON",
        "nothing": "record.json is missing",
        "swapped": f"record.json: volume_id: {VOLUME_ID!r} belongs to another volume",
    }
    assert scan.dropped == ("lost",)
    assert (root / "corrupt" / "record.json.corrupt").exists()
    assert (published / "site.crt").read_text() == "1 "
    again = store.scan()
    assert (again.records, again.dropped) == (scan.records, ())
    assert {entry.reason for entry in again.quarantined} == {"record.json is missing"}


def test_pod_exists_if_in_doubt(store: VolumeStore, published: Path, tmp_path: Path) -> None:
    """A pod is gone only if the kubelet's pods directory exists without it: a lost mount does not orphan all volumes."""
    assert store.pod_exists(POD_UID)
    assert not store.pod_exists("gone")
    (tmp_path / "pods").rename(tmp_path / "moved")
    assert not published.parent.exists()
    assert store.pod_exists(POD_UID)
    assert len(store.scan().records) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EACCES])
def test_path_that_cannot_be_read_may_exist(
    store: VolumeStore, published: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Only a missing path leads to a removal: the disk or the memory of the node can fail for a moment."""

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", fail)
        patch.setattr(os, "stat", fail)
        assert store.pod_exists(POD_UID)
        assert store.pod_exists("gone")
        assert store.has_files(VOLUME_ID)
        assert store.has_files("lost")
    with monkeypatch.context() as patch:
        patch.setattr(VolumeStore, "_read_record", fail)
        patch.setattr(DirectoryMounts, "survey", lambda _self, points: dict.fromkeys(points, False))
        scan = store.scan()
        assert [entry.key for entry in scan.quarantined] == [VOLUME_ID]
    assert (published / "site.crt").read_text() == "1 "
    assert len(store.scan().records) == 1
    assert not store.has_files("lost")


@pytest.mark.usefixtures("published")
def test_usage_is_that_of_the_file_system(store: VolumeStore) -> None:
    usage = store.usage(VOLUME_ID)
    assert 0 <= usage.f_bfree < usage.f_blocks
    with pytest.raises(CertmountError, match=r"^VolumeNotFound: "):
        store.usage("unknown")
