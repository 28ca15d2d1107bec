"""A CA in files: invalid files never replace a valid CA. The commands of docs/ca.md create such files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.certificates import INTERMEDIATE_LIFETIME
from csi_driver.authority.ca.keyring import AUTHORITY_KEY_TYPES, KEYRING_FILES, Keyring, encode_keyring, make_keyring
from csi_driver.authority.trust.serving_certificate import SERVING, SERVING_KEY
from csi_driver.core.certificates.name_constraints import NameConstraintSet, parse_constraint
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.names import DNSName, Names, spiffe_id
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


async def test_encrypted_key_needs_a_password_file(directory: Path, tmp_path: Path, metrics: AuthorityMetrics) -> None:
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


DOCUMENT = (Path(__file__).parents[4] / "docs" / "ca.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if not line.startswith("kubectl ")]


@pytest.fixture
def printed(tmp_path: Path) -> str:
    script = "\n".join(["set -e", *commands()])
    return subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True, text=True).stdout


@pytest.mark.peers("openssl", "bash")
async def test_documented_commands_create_a_valid_ca(printed: str, tmp_path: Path, metrics: AuthorityMetrics) -> None:
    """The CA is valid for names of the cluster only. The last command prints the fingerprint that the authority logs."""
    assert "intermediate.crt: OK" in printed
    keyring = (await CAFiles(tmp_path, metrics).refresh(datetime.now(UTC))).keyring
    bounds = NameConstraintSet.of((keyring.intermediate.certificate, *keyring.chain, keyring.root))
    inside = ["shop.web.svc", "shop.web.svc.cluster.local"]
    assert bounds.violations(Names.of(map(DNSName.parse, inside), [spiffe_id("cluster.local", "web", "shop")])) == []
    assert len(bounds.violations(Names.of([DNSName.parse("example.com")], [spiffe_id("other", "web", "shop")]))) == 2
    assert fingerprint(keyring.root).removeprefix("SHA256:") == printed.strip().rpartition("=")[2]


def test_page_names_all_files_key_types_and_constraints() -> None:
    assert all(f"`{name}`" in DOCUMENT for name in (*KEYRING_FILES, SERVING, SERVING_KEY))
    assert all(f"`{kind.value}`" in DOCUMENT for kind in AUTHORITY_KEY_TYPES)
    examples = re.findall(r"`((?:dns|uri|ip|email):[^`]+)`", DOCUMENT)
    assert len({parse_constraint(example) for example in examples}) >= 6
