# ruff: noqa: ASYNC240  # a test that looks at files has nothing else to run meanwhile
"""The CA in a folder: whole or not at all, and one for all who share it."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import KEYRING_FILES
from csi_driver.authority.storage import DirectoryStore, ca_part, serving_part
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored_secrets import StoredSecrets
from csi_driver.host.atomic_write import replace_file
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

VALUES = {"root.crt": Secret(b"certificate"), "root.key": Secret(b"\x00key\xff")}


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    return tmp_path / "ca" / "ca.json"


@pytest.fixture
def store(ca_file: Path) -> DirectoryStore:
    return DirectoryStore(ca_file.parent)


async def test_an_empty_folder_holds_no_ca(store: DirectoryStore, ca_file: Path) -> None:
    """Also one that is not there yet; looking makes nothing."""
    assert await store.load() == StoredSecrets({}, "")
    assert not ca_file.parent.exists()


async def test_values_are_read_back_as_saved(store: DirectoryStore) -> None:
    """Whatever their bytes."""
    assert await store.save(VALUES, await store.load())
    assert (await store.load()).values == VALUES


async def test_only_the_owner_may_look(store: DirectoryStore, ca_file: Path) -> None:
    """Folder 0700, file 0600, whatever the umask."""
    before = os.umask(0)
    try:
        await store.save(VALUES, await store.load())
    finally:
        os.umask(before)
    assert (ca_file.parent.stat().st_mode & 0o777, ca_file.stat().st_mode & 0o777) == (0o700, 0o600)


async def test_the_second_of_two_writers_learns_that_it_is_late(store: DirectoryStore) -> None:
    """Both have seen the same; one wins, and what it wrote stays."""
    seen = await store.load()
    assert await store.save(VALUES, seen)
    assert not await store.save({"root.crt": Secret(b"other")}, seen)
    assert (await store.load()).values == VALUES
    assert await store.save({"root.crt": Secret(b"other")}, await store.load())


async def test_two_parts_of_a_store_leave_each_other_alone(store: DirectoryStore) -> None:
    """Each saves what is its own, and learns when the other one was there in between."""
    ca, serving = ca_part(store), serving_part(store)
    assert await ca.save(VALUES, await ca.load())
    seen = await ca.load()
    assert await serving.save({"serving.crt": Secret(b"s")}, await serving.load())
    assert not await ca.save({"root.crt": Secret(b"new")}, seen)
    assert await ca.save({"root.crt": Secret(b"new")}, await ca.load())
    assert (await ca.load()).values == {"root.crt": Secret(b"new")}
    assert (await serving.load()).values == {"serving.crt": Secret(b"s")}
    assert ca.name == serving.name == store.name


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b'{"root.crt": 7}', b'{"root.crt": "%"}', b"\xff", b"[" * 90_000]
)
async def test_a_damaged_file_is_an_error_and_stays(content: bytes, store: DirectoryStore, ca_file: Path) -> None:
    """It may be the only copy of a root that pods trust: never taken for an empty store."""
    await store.save(VALUES, await store.load())
    ca_file.write_bytes(content)
    with pytest.raises(CertmountError, match=r"ca\.json: is damaged") as failure:
        await CertificateAuthority(StoredCA(store), AuthorityMetrics(CollectorRegistry())).refresh()
    assert failure.value.reason is Reason.INVALID_CA
    assert ca_file.read_bytes() == content


async def test_a_file_that_others_can_read_is_refused(store: DirectoryStore, ca_file: Path) -> None:
    """The keys in it may be known already."""
    await store.save(VALUES, await store.load())
    ca_file.chmod(0o640)
    with pytest.raises(CertmountError, match="is accessible to users other than its owner"):
        await store.load()


async def test_a_link_in_the_files_place_is_refused(store: DirectoryStore, ca_file: Path, tmp_path: Path) -> None:
    """What another user may have put there is not followed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("{}")
    elsewhere.chmod(0o600)
    ca_file.parent.mkdir()
    ca_file.symlink_to(elsewhere)
    with pytest.raises(CertmountError, match="cannot be read"):
        await store.load()


async def test_a_huge_file_is_refused(store: DirectoryStore) -> None:
    """Memory is not filled by a mistake."""
    await store.save({"root.crt": Secret(b"x" * (1024 * 1024))}, await store.load())
    with pytest.raises(CertmountError, match="is longer than"):
        await store.load()


async def test_a_folder_that_is_a_file_says_so(tmp_path: Path) -> None:
    """A clear word in place of a traceback."""
    (tmp_path / "file").write_text("")
    store = DirectoryStore(tmp_path / "file")
    with pytest.raises(CertmountError, match="cannot be"):
        await store.load()
    with pytest.raises(CertmountError, match="cannot be written"):
        await store.save(VALUES, StoredSecrets({}, ""))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the disk is full."""
    file = tmp_path / "root.crt"
    replace_file(file, b"old", mode=0o644)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, b"new", mode=0o644)
    assert [path.name for path in tmp_path.iterdir()] == ["root.crt"]
    assert file.read_bytes() == b"old"


def start_replica(folder: Path) -> str:
    """What an authority does first; returns the fingerprints of the CA that it holds."""

    async def start() -> str:
        ca = CertificateAuthority(StoredCA(DirectoryStore(folder)), AuthorityMetrics(CollectorRegistry()))
        keyring = await ca.refresh()
        return f"{keyring.root.serial_number} {keyring.intermediate.certificate.serial_number}"

    return asyncio.run(start())


def test_threads_that_start_at_once_share_one_ca(tmp_path: Path) -> None:
    """All wait for the same moment, and end with the same root and intermediate."""
    together = threading.Barrier(8)

    def replica(_number: int) -> str:
        together.wait()
        return start_replica(tmp_path / "ca")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(replica, range(8)))) == 1


def _replica_process(folder: str, together: object, results: object) -> None:
    together.wait()  # type: ignore[attr-defined]  # multiprocessing's barrier has no type of its own
    results.put(start_replica(Path(folder)))  # type: ignore[attr-defined]  # likewise its queue


def test_processes_that_start_at_once_share_one_ca(tmp_path: Path) -> None:
    """As two replicas on one folder would."""
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_replica_process, args=(str(tmp_path / "ca"), together, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    try:
        held = {results.get(timeout=60) for _ in processes}
    except Empty:
        pytest.fail("a replica did not start")
    finally:
        for process in processes:
            process.join(10)
    assert len(held) == 1
    assert set(json.loads((tmp_path / "ca" / "ca.json").read_bytes())) == {*KEYRING_FILES, "state.json"}
