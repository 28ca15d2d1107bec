# ruff: noqa: ASYNC240  # blocking file operations are fine in tests
"""The store in a directory: atomic writes, permissions, and replicas that share it."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import KEYRING_FILES
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.storage import DirectoryStore, ca_part, serving_part
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret, StoredSecrets
from csi_driver.host.atomic_write import replace_file
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

VALUES = {"root.crt": Secret(b"certificate"), "root.key": Secret(b"\x00key\xff")}


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    return tmp_path / "ca" / "ca.json"


@pytest.fixture
def store(ca_file: Path) -> DirectoryStore:
    return DirectoryStore(ca_file.parent)


async def rejected(store: DirectoryStore, words: str) -> None:
    with pytest.raises(CertmountError, match=words):
        await store.load()


async def test_missing_directory_is_an_empty_store_until_values_are_saved(store: DirectoryStore, ca_file: Path) -> None:
    assert await store.load() == StoredSecrets({}, "")
    assert not ca_file.parent.exists()
    assert await store.save(VALUES, await store.load())
    assert (await store.load()).values == VALUES


async def test_only_the_owner_has_access(store: DirectoryStore, ca_file: Path) -> None:
    before = os.umask(0)
    try:
        await store.save(VALUES, await store.load())
    finally:
        os.umask(before)
    assert (ca_file.parent.stat().st_mode & 0o777, ca_file.stat().st_mode & 0o777) == (0o700, 0o600)


async def test_second_of_two_concurrent_saves_fails(store: DirectoryStore) -> None:
    seen = await store.load()
    assert await store.save(VALUES, seen)
    assert not await store.save({"root.crt": Secret(b"other")}, seen)
    seen = await store.load()
    assert seen.values == VALUES
    assert await store.save({"root.crt": Secret(b"other")}, seen)


async def test_parts_of_a_store_do_not_change_each_others_values(store: DirectoryStore) -> None:
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
async def test_invalid_file_is_an_error_and_is_kept(content: bytes, store: DirectoryStore, ca_file: Path) -> None:
    """It can be the only copy of a root that pods trust."""
    await store.save(VALUES, await store.load())
    ca_file.write_bytes(content)
    with pytest.raises(CertmountError, match=r"ca\.json: is damaged") as failure:
        await CertificateAuthority(StoredCA(store), AuthorityMetrics(CollectorRegistry())).refresh()
    assert failure.value.reason is Reason.INVALID_CA
    assert ca_file.read_bytes() == content


async def test_file_that_other_users_can_read_is_rejected(store: DirectoryStore, ca_file: Path) -> None:
    """They can already have the keys."""
    await store.save(VALUES, await store.load())
    ca_file.chmod(0o640)
    await rejected(store, "is accessible to users other than its owner")


async def test_symbolic_link_is_rejected(store: DirectoryStore, ca_file: Path, tmp_path: Path) -> None:
    """Another user can have created it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("{}")
    elsewhere.chmod(0o600)
    ca_file.parent.mkdir()
    ca_file.symlink_to(elsewhere)
    await rejected(store, "cannot be read")


async def test_huge_file_is_rejected(store: DirectoryStore) -> None:
    await store.save({"root.crt": Secret(b"x" * (1024 * 1024))}, await store.load())
    await rejected(store, "is longer than")


async def test_file_in_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "file")
    (tmp_path / "file").write_text("")
    await rejected(store, "cannot be")
    with pytest.raises(CertmountError, match="cannot be written"):
        await store.save(VALUES, StoredSecrets({}, ""))


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "root.crt"
    replace_file(file, b"old", mode=0o644)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, b"new", mode=0o644)
    assert [path.name for path in tmp_path.iterdir()] == ["root.crt"]
    assert file.read_bytes() == b"old"


def _start_replica(directory: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    ca = CertificateAuthority(StoredCA(DirectoryStore(Path(directory))), AuthorityMetrics(CollectorRegistry()))
    keyring = asyncio.run(ca.refresh())
    results.put(f"{keyring.root.serial_number} {keyring.intermediate.certificate.serial_number}")


def test_processes_that_start_at_once_use_the_same_ca(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path / "ca"), barrier, results)
    processes = [context.Process(target=_start_replica, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    try:
        assert len({results.get(timeout=60) for _ in processes}) == 1
    finally:
        for process in processes:
            process.join(10)
    assert set(json.loads((tmp_path / "ca" / "ca.json").read_bytes())) == {*KEYRING_FILES, "state.json"}
