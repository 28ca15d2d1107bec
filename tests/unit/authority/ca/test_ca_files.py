"""A CA from files: taken when it is good, kept when what follows is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.key_pairs import INTERMEDIATE_LIFETIME
from csi_driver.authority.ca.keyring import Keyring, encode_keyring, make_keyring
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.clock import Clock

NOW = Clock().utc()
ONE, OTHER = make_keyring(NOW), make_keyring(NOW)


def write(folder: Path, values: Mapping[str, Secret[bytes]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        (folder / name).write_bytes(value.reveal())


def encrypted(keyring: Keyring, password: bytes) -> Mapping[str, Secret[bytes]]:
    pem = keyring.intermediate.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    return {**encode_keyring(keyring), "intermediate.key": Secret(pem)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ca"
    write(folder, encode_keyring(ONE))
    return folder


@pytest.fixture
def files(folder: Path, metrics: AuthorityMetrics) -> CAFiles:
    return CAFiles(folder, metrics)


def failures(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("certmount_ca_refresh_failures_total")


async def test_files_are_taken_and_their_fingerprints_logged(files: CAFiles) -> None:
    """So that people can compare; what has not changed is not read into a new keyring."""
    with capture_logs() as logs:
        first = await files.refresh(NOW)
        assert await files.refresh(NOW) is first
    assert first.intermediate.certificate == ONE.intermediate.certificate
    assert [(line["root"], line["intermediate"]) for line in logs] == [
        (fingerprint(ONE.root), fingerprint(ONE.intermediate.certificate))
    ]


async def test_a_root_key_beside_them_is_not_read(files: CAFiles) -> None:
    """It isn't needed, as nothing is written there; so who writes the files renews, and hears of it in time."""
    keyring = await files.refresh(NOW)
    assert keyring.root_key is None
    later = NOW + INTERMEDIATE_LIFETIME * 0.9
    assert not keyring.intermediate_due(later)
    assert [ending.name for ending in keyring.expiring(later)] == ["intermediate.crt"]


async def test_new_files_are_taken(files: CAFiles, folder: Path) -> None:
    """Without a restart, by their content."""
    await files.refresh(NOW)
    write(folder, encode_keyring(OTHER))
    assert (await files.refresh(NOW)).root == OTHER.root


async def test_bad_new_files_change_nothing(files: CAFiles, folder: Path, registry: CollectorRegistry) -> None:
    """The former CA goes on signing; that is said and counted once for each content, and forgotten when they are good."""
    first = await files.refresh(NOW)
    with capture_logs() as logs:
        for content in (b"", b"hello", b"hello", b""):
            (folder / "intermediate.key").write_bytes(content)
            assert await files.refresh(NOW) is first
            assert await files.refresh(NOW) is first
    assert len(logs) == failures(registry) == 3
    assert all(line["log_level"] == "error" for line in logs)
    write(folder, encode_keyring(OTHER))
    assert (await files.refresh(NOW)).root == OTHER.root


async def test_files_that_are_not_valid_yet_become_good_by_themselves(folder: Path, metrics: AuthorityMetrics) -> None:
    """What issues them may have a clock that is ahead."""
    files = CAFiles(folder, metrics)
    await files.refresh(NOW)
    ahead = make_keyring(NOW + INTERMEDIATE_LIFETIME / 100)
    write(folder, encode_keyring(ahead))
    assert (await files.refresh(NOW)).root == ONE.root
    assert (await files.refresh(NOW + INTERMEDIATE_LIFETIME / 100)).root == ahead.root


async def test_without_any_good_files_there_is_no_ca(folder: Path, metrics: AuthorityMetrics) -> None:
    """At the start every fault is said at once, with the folder's name and no word of making a new CA."""
    (folder / "root.crt").unlink()
    (folder / "intermediate.key").write_bytes(b"hello")
    with pytest.raises(CertmountError, match=r"\(1\).*root\.crt: is missing.*\(2\).*intermediate\.key") as refusal:
        await CAFiles(folder, metrics).refresh(NOW)
    assert refusal.value.reason is Reason.INVALID_CA
    assert str(folder) in str(refusal.value)
    assert "new CA" not in str(refusal.value)


def spoil(folder: Path, what: str) -> None:
    key = folder / "intermediate.key"
    key.unlink()
    if what in ("gone", "a file"):
        shutil.rmtree(folder)
    if what == "a file":
        folder.touch()
    if what == "a pipe inside":
        os.mkfifo(key)
    if what == "a folder inside":
        key.mkdir()
    if what == "too long":
        key.write_bytes(b"x" * (1024 * 1024 + 1))


@pytest.mark.parametrize("what", ["gone", "a file", "a pipe inside", "a folder inside", "too long"])
async def test_what_is_no_folder_of_files_is_said(what: str, folder: Path, metrics: AuthorityMetrics) -> None:
    """In words, and without waiting for a pipe's writer."""
    spoil(folder, what)
    with pytest.raises(CertmountError, match=r"cannot be read: \w+"):
        await CAFiles(folder, metrics).refresh(NOW)


async def test_an_encrypted_key_opens_with_the_password_file(
    folder: Path, tmp_path: Path, metrics: AuthorityMetrics
) -> None:
    """Whose line end does not count; without the file, or with another word in it, the message says which it is."""
    write(folder, encrypted(ONE, b"canary-password"))
    with pytest.raises(CertmountError, match=r"intermediate\.key: is encrypted, and there is no password"):
        await CAFiles(folder, metrics).refresh(NOW)
    password = tmp_path / "password"
    files = CAFiles(folder, metrics, password)
    with pytest.raises(CertmountError, match=r"password: cannot be read: there is no such file"):
        await files.refresh(NOW)
    password.write_bytes(b"canary-passwort\n")
    with pytest.raises(CertmountError, match="is encrypted with another password than the one given") as refusal:
        await files.refresh(NOW)
    assert "canary" not in str(refusal.value)
    password.write_bytes(b"canary-password\n")
    keyring = await files.refresh(NOW)
    assert keyring.encrypted
    assert "canary" not in repr(keyring) + repr(files.__dict__)


def swap(mount: Path, generation: str, values: Mapping[str, Secret[bytes]]) -> None:
    """As the kubelet does it: a new folder, a link that changes at once, then away with the former folder."""
    write(mount / generation, values)
    (mount / "..data_tmp").symlink_to(generation)
    former = (mount / "..data").resolve() if (mount / "..data").exists() else None
    (mount / "..data_tmp").rename(mount / "..data")
    for name in values:
        if not (mount / name).is_symlink():
            (mount / name).symlink_to(f"..data/{name}")
    if former:
        shutil.rmtree(former)


async def test_a_secret_mounted_by_the_kubelet_is_read_as_one(
    tmp_path: Path, metrics: AuthorityMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap in the middle of the reading mixes nothing: it is read again."""
    mount = tmp_path / "secret"
    mount.mkdir()
    swap(mount, "..1", encode_keyring(ONE))
    files = CAFiles(mount, metrics)
    assert (await files.refresh(NOW)).root == ONE.root
    opened = os.open
    swapped: list[str] = []

    def swap_once(path: str, *arguments: int, **options: int) -> int:
        if path == "intermediate.crt" and not swapped:
            swapped.append(path)
            swap(mount, "..2", encode_keyring(OTHER))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", swap_once)
    assert (await files.refresh(NOW)).root == OTHER.root
    assert swapped


async def test_files_that_change_all_the_time_are_no_ca(files: CAFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, rather than to read for ever."""
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with pytest.raises(CertmountError, match="changes faster than it can be read"):
        await files.refresh(NOW)
