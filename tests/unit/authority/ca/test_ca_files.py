"""A CA in files: new valid files are used; with invalid files the previous CA stays in use."""

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
from csi_driver.authority.ca.certificates import INTERMEDIATE_LIFETIME
from csi_driver.authority.ca.keyring import Keyring, encode_keyring, make_keyring
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.clock import Clock

NOW = Clock().utc()
ONE, OTHER = make_keyring(NOW), make_keyring(NOW)


def write(directory: Path, values: Mapping[str, Secret[bytes]]) -> None:
    directory.mkdir(exist_ok=True)
    for name, value in values.items():
        (directory / name).write_bytes(value.reveal())


def encrypted(keyring: Keyring, password: bytes) -> Mapping[str, Secret[bytes]]:
    pem = keyring.intermediate.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    return {**encode_keyring(keyring), "intermediate.key": Secret(pem)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "ca"
    write(directory, encode_keyring(ONE))
    return directory


@pytest.fixture
def files(directory: Path, metrics: AuthorityMetrics) -> CAFiles:
    return CAFiles(directory, metrics)


def failures(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("certmount_ca_refresh_failures_total")


async def test_valid_files_are_used_and_their_fingerprints_logged(files: CAFiles) -> None:
    with capture_logs() as logs:
        first = await files.refresh(NOW)
        assert await files.refresh(NOW) is first
    assert first.keyring.intermediate.certificate == ONE.intermediate.certificate
    assert [(line["root"], line["intermediate"]) for line in logs] == [
        (fingerprint(ONE.root), fingerprint(ONE.intermediate.certificate))
    ]


async def test_root_key_is_not_read(files: CAFiles) -> None:
    """The owner of the files renews the intermediate, because certmount writes nothing there."""
    keyring = (await files.refresh(NOW)).keyring
    assert keyring.root_key is None
    later = NOW + INTERMEDIATE_LIFETIME * 0.9
    assert not keyring.intermediate_due(later)
    assert [ending.name for ending in keyring.expiring(later)] == ["intermediate.crt"]


async def test_new_files_are_used_without_a_restart(files: CAFiles, directory: Path) -> None:
    await files.refresh(NOW)
    write(directory, encode_keyring(OTHER))
    assert (await files.refresh(NOW)).keyring.root == OTHER.root


async def test_invalid_files_keep_the_previous_ca(files: CAFiles, directory: Path, registry: CollectorRegistry) -> None:
    """Each content is logged and counted once."""
    first = await files.refresh(NOW)
    with capture_logs() as logs:
        for content in (b"", b"hello", b"hello", b""):
            (directory / "intermediate.key").write_bytes(content)
            assert await files.refresh(NOW) is first
            assert await files.refresh(NOW) is first
    assert len(logs) == failures(registry) == 3
    assert all(line["log_level"] == "error" for line in logs)
    write(directory, encode_keyring(OTHER))
    assert (await files.refresh(NOW)).keyring.root == OTHER.root


async def test_files_that_are_not_valid_yet_are_used_later(directory: Path, metrics: AuthorityMetrics) -> None:
    """The clock of their issuer may be ahead."""
    files = CAFiles(directory, metrics)
    await files.refresh(NOW)
    ahead = make_keyring(NOW + INTERMEDIATE_LIFETIME / 100)
    write(directory, encode_keyring(ahead))
    assert (await files.refresh(NOW)).keyring.root == ONE.root
    assert (await files.refresh(NOW + INTERMEDIATE_LIFETIME / 100)).keyring.root == ahead.root


async def test_first_error_lists_all_faults(directory: Path, metrics: AuthorityMetrics) -> None:
    """It contains the directory, and no hint to create a new CA."""
    (directory / "root.crt").unlink()
    (directory / "intermediate.key").write_bytes(b"hello")
    with pytest.raises(CertmountError, match=r"\(1\).*root\.crt: is missing.*\(2\).*intermediate\.key") as refusal:
        await CAFiles(directory, metrics).refresh(NOW)
    assert refusal.value.reason is Reason.INVALID_CA
    assert str(directory) in str(refusal.value)
    assert "new CA" not in str(refusal.value)


def spoil(directory: Path, what: str) -> None:
    key = directory / "intermediate.key"
    key.unlink()
    if what in ("gone", "a file"):
        shutil.rmtree(directory)
    if what == "a file":
        directory.touch()
    if what == "a pipe inside":
        os.mkfifo(key)
    if what == "a directory inside":
        key.mkdir()
    if what == "too long":
        key.write_bytes(b"x" * (1024 * 1024 + 1))


@pytest.mark.parametrize("what", ["gone", "a file", "a pipe inside", "a directory inside", "too long"])
async def test_unreadable_files_are_an_error(what: str, directory: Path, metrics: AuthorityMetrics) -> None:
    """A named pipe must not block."""
    spoil(directory, what)
    with pytest.raises(CertmountError, match=r"cannot be read: \w+|is longer than"):
        await CAFiles(directory, metrics).refresh(NOW)


async def test_encrypted_key_needs_the_password_file(
    directory: Path, tmp_path: Path, metrics: AuthorityMetrics
) -> None:
    """The line break at the end of the password is ignored."""
    write(directory, encrypted(ONE, b"canary-password"))
    with pytest.raises(CertmountError, match=r"intermediate\.key: is encrypted, and no password is configured"):
        await CAFiles(directory, metrics).refresh(NOW)
    password = tmp_path / "password"
    files = CAFiles(directory, metrics, password)
    with pytest.raises(CertmountError, match=r"password: cannot be read: No such file"):
        await files.refresh(NOW)
    password.write_bytes(b"canary-passwort\n")
    with pytest.raises(CertmountError, match="is encrypted with a different password") as refusal:
        await files.refresh(NOW)
    assert "canary" not in str(refusal.value)
    password.write_bytes(b"canary-password\n")
    keyring = (await files.refresh(NOW)).keyring
    assert keyring.encrypted
    assert "canary" not in repr(keyring) + repr(files.__dict__)


def swap(mount: Path, generation: str, values: Mapping[str, Secret[bytes]]) -> None:
    """Do what the kubelet does: create a directory, replace the link, and remove the previous directory."""
    write(mount / generation, values)
    (mount / "..data_tmp").symlink_to(generation)
    former = (mount / "..data").resolve() if (mount / "..data").exists() else None
    (mount / "..data_tmp").rename(mount / "..data")
    for name in values:
        if not (mount / name).is_symlink():
            (mount / name).symlink_to(f"..data/{name}")
    if former:
        shutil.rmtree(former)


async def test_mounted_secret_is_read_consistently(
    tmp_path: Path, metrics: AuthorityMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the kubelet replaces the files in the middle, they are read again."""
    mount = tmp_path / "secret"
    mount.mkdir()
    swap(mount, "..1", encode_keyring(ONE))
    files = CAFiles(mount, metrics)
    assert (await files.refresh(NOW)).keyring.root == ONE.root
    opened = os.open
    swapped: list[str] = []

    def swap_once(path: str, *arguments: int, **options: int) -> int:
        if path == "intermediate.crt" and not swapped:
            swapped.append(path)
            swap(mount, "..2", encode_keyring(OTHER))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", swap_once)
    assert (await files.refresh(NOW)).keyring.root == OTHER.root
    assert swapped


async def test_endlessly_changing_files_are_an_error(files: CAFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with pytest.raises(CertmountError, match="changes faster than it can be read"):
        await files.refresh(NOW)
