"""Programs read every format of a volume, and connect by TLS with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from csi_driver.authority.ca.certificates import Leaf, sign_leaf
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.core.attributes import parse_attributes
from csi_driver.core.formats.file_format import StorePassword, VolumeContents
from csi_driver.core.names import DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType, Usage
from tests.integration.node.world import running_node
from tests.peers import readers
from tests.peers.readers import attributes_for, serial_in
from tests.unit.core.pki import key_of

NOW = datetime.now(UTC).replace(microsecond=0)
KEYRING, NEXT = make_keyring(NOW), make_keyring(NOW)
PASSWORD = StorePassword(Secret(b"generated-password"), generated=True)
TLS_KINDS = [kind for kind in KeyType if not kind.value.startswith("ML-DSA")]
ENCRYPTIONS = ("modern", "legacy")
TRADITIONAL = [
    (kind, encoding)
    for prefix, encoding in (("RSA", "pkcs1"), ("EC", "sec1"))
    for kind in TLS_KINDS
    if kind.value.startswith(prefix)
]
"""The key types with an encoding other than PKCS#8."""


def write_files(directory: Path, kind: KeyType, encryption: str = "modern", encoding: str = "pkcs8") -> Path:
    """Write all formats of a new certificate, with two roots, into a directory."""
    leaf = Leaf(key_of(kind).public_key(), Names.of([DNSName.parse("localhost")]), timedelta(hours=1), tuple(Usage))
    chain = (sign_leaf(leaf, KEYRING.intermediate, NOW), KEYRING.intermediate.certificate)
    contents = VolumeContents(key_of(kind), chain, (KEYRING.root, NEXT.root), PASSWORD, NOW.timestamp())
    options = {"key-encoding": encoding, **({} if kind not in TLS_KINDS else {"pkcs12-encryption": encryption})}
    layout = parse_attributes({**attributes_for(kind), "key-type": kind.value, **options}).layout
    directory.mkdir()
    for file in layout.render(contents):
        (directory / file.name).write_bytes(file.content.reveal())
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All formats for each key type with which programs connect by TLS, each encryption of the stores, and each encoding."""
    root = tmp_path_factory.mktemp("formats")
    encrypted = [write_files(root / f"{kind.value}-{one}", kind, one) for kind in TLS_KINDS for one in ENCRYPTIONS]
    return encrypted + [write_files(root / f"{kind.value}-{one}", kind, encoding=one) for kind, one in TRADITIONAL]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mounted() -> AsyncIterator[dict[tuple[KeyType, str], Path]]:
    """Volumes of the driver process, with all formats. They are real mounts if the test runs as root."""
    async with running_node() as node:
        requests = {}
        for kind, encoding in (*((kind, "pkcs8") for kind in KeyType), *TRADITIONAL):
            attributes = {"key-type": kind.value, "key-encoding": encoding, "name": "localhost"}
            requests[kind, encoding] = await node.published(attributes={**attributes_for(kind), **attributes})
        yield {case: node.target(request) for case, request in requests.items()}
        await node.clear()


@pytest.mark.parametrize(
    "kind, encryption", [(kind, one) for kind in KeyType for one in (ENCRYPTIONS if kind in TLS_KINDS else ("modern",))]
)
def test_openssl(kind: KeyType, encryption: str, tmp_path: Path) -> None:
    directory = write_files(tmp_path / "files", kind, encryption)
    assert readers.openssl(directory, kind, stores=kind in TLS_KINDS) == {serial_in(directory)}


@pytest.mark.parametrize("kind", KeyType)
def test_python(kind: KeyType, tmp_path: Path) -> None:
    """With the package cryptography; tests/unit/core/formats has the handshakes of the module ssl."""
    directory = write_files(tmp_path / "files", kind)
    assert readers.python(directory, stores=kind in TLS_KINDS) == {serial_in(directory)}


@pytest.mark.parametrize("kind, encoding", TRADITIONAL)
def test_encodings_of_the_key(kind: KeyType, encoding: str, tmp_path: Path) -> None:
    directory = write_files(tmp_path / "files", kind, encoding=encoding)
    first = {"pkcs1": "-----BEGIN RSA PRIVATE KEY-----", "sec1": "-----BEGIN EC PRIVATE KEY-----"}[encoding]
    assert (directory / "tls.key").read_text().startswith(first)
    assert readers.openssl(directory, kind, stores=True) == {serial_in(directory)}
    assert readers.python(directory, stores=True) == {serial_in(directory)}


def test_java_reads_keys_in_pkcs8_only(directories: list[Path]) -> None:
    """So a Java program needs a key store, or the default encoding."""
    expected = {path: not path.name.endswith(("-pkcs1", "-sec1")) for path in directories}
    assert readers.java_keys(directories) == expected
    assert set(expected.values()) == {True, False}


def test_go(directories: list[Path]) -> None:
    assert readers.go(directories) == {directory: {serial_in(directory)} for directory in directories}


def test_node(directories: list[Path]) -> None:
    assert readers.node(directories) == {directory: {serial_in(directory)} for directory in directories}


@pytest.mark.parametrize("encryption", ENCRYPTIONS)
@pytest.mark.parametrize("kind", TLS_KINDS)
def test_keytool(kind: KeyType, encryption: str, tmp_path: Path) -> None:
    directory = write_files(tmp_path / "files", kind, encryption)
    assert readers.keytool(directory) == {serial_in(directory)}


async def connect_to_java(directories: list[Path]) -> None:
    async with readers.java_servers(directories) as servers:
        assert servers.keys() == set(directories)
        for directory, (port, serial, roots) in servers.items():
            assert serial == serial_in(directory)
            assert roots == (directory / "ca.crt").read_text().count("BEGIN CERTIFICATE")
            assert await readers.ask_java(port, directory) == (serial, serial)


async def test_java_server(directories: list[Path]) -> None:
    """A Java TLS server uses both stores: its key, and the roots for the client's certificate."""
    await connect_to_java(directories)


@pytest.mark.timeout(240)  # hundreds of processes
@pytest.mark.asyncio(loop_scope="module")
async def test_all_programs_read_the_volumes_of_the_driver(mounted: dict[tuple[KeyType, str], Path]) -> None:
    assert {case: readers.python(path, stores=case[0] in TLS_KINDS) for case, path in mounted.items()} == {
        case: {serial_in(path)} for case, path in mounted.items()
    }
    directories = [path for (kind, _), path in mounted.items() if kind in TLS_KINDS]
    expected = {directory: {serial_in(directory)} for directory in directories}
    assert await asyncio.to_thread(readers.go, directories) == expected
    assert await asyncio.to_thread(readers.node, directories) == expected
    for (kind, encoding), path in mounted.items():
        if kind in TLS_KINDS:
            assert await asyncio.to_thread(readers.openssl, path, kind, stores=True) == expected[path]
            if encoding == "pkcs8":  # stores do not depend on it
                assert await asyncio.to_thread(readers.keytool, path) == expected[path]
    await connect_to_java(directories)
