"""Every change of a volume renders all its files, so that none becomes stale."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, pkcs12
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.file_format import StorePassword, VolumeContents
from csi_driver.core.formats.registry import FORMATS, PRESETS
from csi_driver.core.secret import Secret
from csi_driver.host.generations import PRIVATE
from csi_driver.node.volumes.volume_files import FileAccess, VolumeFiles, read_contents
from tests.support.scripted_authority import TestCA

ONE, TWO = TestCA("one"), TestCA("two")
OPEN = FileAccess(None, None, 0o444)
# All formats at the same time: each attribute that names a file.
ALL = parse_attributes({"files": "java", **{each.attribute: each.example for each in FORMATS}}).layout
PASSWORD = StorePassword(Secret(b"secret"), generated=True)
CONTENTS = VolumeContents(ONE.key, (ONE.certificate,), (ONE.certificate,), PASSWORD, 1_800_000_000.0)


@pytest.fixture
def files(tmp_path: Path) -> VolumeFiles:
    for name in ("files", PRIVATE):
        (tmp_path / name).mkdir()
    return VolumeFiles(tmp_path / "files", ALL, OPEN)


def shown(files: VolumeFiles) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files.files_dir.iterdir() if not path.name.startswith("..")}


def assert_all_match(files: VolumeFiles, expected: VolumeContents, password: bytes) -> None:
    """Every file represents the expected contents."""
    found, leaf, key = shown(files), expected.chain[0], expected.key
    assert key is not None
    assert found.keys() == {each.example for each in FORMATS} | {"generation.json"}
    pem_key = found["tls.key"]
    assert found["tls.pem"] == pem_key + found["tls.crt"]
    assert found["tls.crt"] == leaf.public_bytes(Encoding.PEM)
    assert found["tls.der"] == leaf.public_bytes(Encoding.DER)
    assert found["ca.crt"] == b"".join(root.public_bytes(Encoding.PEM) for root in expected.roots)
    store = pkcs12.load_pkcs12(found["keystore.p12"], password)
    assert store.cert is not None
    assert store.cert.certificate == leaf
    assert public_bytes(store.key.public_key()) == public_bytes(key.public_key())  # type: ignore[union-attr,arg-type]  # it has one
    roots = pkcs12.load_pkcs12(found["truststore.p12"], password).additional_certs
    assert [each.certificate for each in roots] == list(expected.roots)
    summary = json.loads(found["generation.json"])
    assert summary["sha256"] == leaf.fingerprint(SHA256()).hex()
    assert summary["roots_sha256"] == [root.fingerprint(SHA256()).hex() for root in expected.roots]


def test_new_roots_change_every_file(files: VolumeFiles) -> None:
    files.write(CONTENTS, 1.0)
    assert files.replace_roots([ONE.der, TWO.der], 2.0)
    expected = replace(CONTENTS, roots=(ONE.certificate, TWO.certificate))
    assert_all_match(files, expected, b"secret")
    found = read_contents(files.files_dir)
    assert replace(found, key=None) == replace(expected, key=None)


def test_new_key_changes_every_file_and_keeps_the_password(files: VolumeFiles) -> None:
    files.write(CONTENTS, 1.0)
    renewed = VolumeContents(TWO.key, (TWO.certificate,), (TWO.certificate,))
    files.renew(renewed, 2.0)
    assert_all_match(files, renewed, b"secret")
    assert shown(files)["keystore.password"] == b"secret"


def test_password_of_the_pod_replaces_a_generated_one(files: VolumeFiles) -> None:
    files.write(CONTENTS, 1.0)
    assert files.replace_password(Secret(b"changed"), 2.0)
    assert "keystore.password" not in shown(files)
    assert pkcs12.load_pkcs12(shown(files)["keystore.p12"], b"changed").key is not None
    assert not files.replace_password(Secret(b"changed"), 3.0)


def test_damaged_volume_gets_a_new_password_at_the_next_renewal(files: VolumeFiles) -> None:
    files.write(CONTENTS, 1.0)
    for path in (files.files_dir.parent / PRIVATE).iterdir():
        path.write_bytes(b"garbage")
    files.renew(CONTENTS, 2.0)
    password = shown(files)["keystore.password"]
    assert password != b"secret"
    assert_all_match(files, CONTENTS, password)


def test_same_roots_write_nothing(files: VolumeFiles) -> None:
    """So applications do not reload their files."""
    files.write(CONTENTS, 1.0)
    before = shown(files)
    assert not files.replace_roots([ONE.der], 2.0)
    assert shown(files) == before


def test_volume_without_a_key_has_only_what_represents_roots(files: VolumeFiles) -> None:
    files.write(VolumeContents(None, (), (ONE.certificate,), PASSWORD), 1.0)
    assert shown(files).keys() == {"ca.crt", "truststore.p12", "keystore.password", "generation.json"}
    assert json.loads(shown(files)["generation.json"])["serial"] is None
    assert read_contents(files.files_dir) == VolumeContents(None, (), (ONE.certificate,), PASSWORD)


@pytest.mark.parametrize(
    "attributes, mount_group, expected",
    [
        ({}, None, (0, 0, 0o444)),
        ({}, 2000, (0, 2000, 0o440)),
        ({"gid": "3000"}, 2000, (0, 3000, 0o440)),
        ({"fs-group": "3000"}, None, (0, 3000, 0o440)),
        ({"uid": "999"}, None, (999, 0, 0o400)),
        ({"uid": "999"}, 2000, (999, 2000, 0o440)),
        ({"uid": "999", "key-mode": "0600"}, 2000, (999, 2000, 0o600)),
        ({"gid": "999", "key-mode": "0640"}, None, (0, 999, 0o640)),
        ({"key-mode": "0400"}, None, (0, 0, 0o400)),
        ({"files": "postgres", "uid": "999"}, 2000, (999, 2000, 0o400)),
        ({"files": "postgres"}, 2000, (0, 2000, 0o440)),
    ],
)
@pytest.mark.root
def test_private_files_have_the_owner_and_the_mode_of_the_attributes(
    files: VolumeFiles, attributes: dict[str, str], mount_group: int | None, expected: tuple[int, int, int]
) -> None:
    """Also after each renewal. Every user can read the public files."""
    access = FileAccess.of(parse_attributes(attributes), mount_group)
    volume = replace(files, access=access)
    volume.write(CONTENTS, 1.0)
    volume.renew(CONTENTS, 2.0)
    private = {"tls.key", "tls.pem", "keystore.p12", "keystore.password", "tls.key.der"}
    for name in shown(files):
        found = (files.files_dir / name).stat()
        rights = (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))
        assert rights == (expected if name in private else (0, 0, 0o444)), name


IDS = st.none() | st.integers(0, 2**31 - 1)


@given(IDS, IDS, IDS, st.sampled_from(["", "0400", "0440", "0600", "0640"]), st.sampled_from(list(PRESETS)))
def test_any_owner_group_and_mode_apply_to_the_private_files_only(
    uid: int | None, gid: int | None, mount_group: int | None, mode: str, preset: str
) -> None:
    """Every user can read a private file only if the pod sets neither an owner nor a group nor a mode."""
    given_ids = {name: str(value) for name, value in (("uid", uid), ("gid", gid)) if value is not None}
    spec = parse_attributes({"files": preset, **given_ids, **({"key-mode": mode} if mode else {})})
    rendered = VolumeFiles(Path("/unused"), spec.layout, FileAccess.of(spec, mount_group)).render(CONTENTS)
    private_names = {
        spec.layout.names[each.attribute] for each in FORMATS if each.private and each.attribute in spec.layout.names
    }
    group = mount_group if gid is None else gid
    for file in rendered.files:
        if file.name not in private_names:
            assert (file.mode, file.gid, file.uid) == (0o444, None, None)
            continue
        assert (file.gid, file.uid) == (group, uid)
        assert bool(file.mode & 0o007) == (not mode and uid is None and group is None)
        assert not mode or file.mode == int(mode, 8)


@pytest.mark.parametrize(
    "access, strict",
    [
        (FileAccess(None, None, 0o444), False),
        (FileAccess(None, 999, 0o440), True),
        (FileAccess(None, 999, 0o640), True),
        (FileAccess(0, 999, 0o640), True),
        (FileAccess(999, None, 0o600), True),
        (FileAccess(999, 999, 0o440), False),
        (FileAccess(999, None, 0o640), False),
    ],
)
def test_strict_programs_accept_a_group_only_if_root_owns_the_key(access: FileAccess, *, strict: bool) -> None:
    """PostgreSQL and OpenSSH themselves are tested in tests/peers/test_postgresql.py."""
    assert access.is_strict == strict


@pytest.mark.parametrize("content", [b"garbage", b"[]", b"{}", b'{"key": 1, "chain": "", "roots": ""}'])
def test_unusable_files_raise_invalid_response(files: VolumeFiles, content: bytes) -> None:
    files.write(CONTENTS, 1.0)
    for path in (files.files_dir.parent / PRIVATE).iterdir():
        path.write_bytes(content)
    with pytest.raises(CertmountError, match=r"^InvalidResponse: volume: the driver's copy"):
        read_contents(files.files_dir)


def test_sizes_are_those_of_the_files_that_are_written(files: VolumeFiles) -> None:
    rendered = files.render(CONTENTS)
    files.write_rendered(rendered, 1.0)
    paths = [*(files.files_dir / "..data").iterdir(), *(files.files_dir.parent / PRIVATE).iterdir()]
    assert sorted(rendered.sizes) == sorted(path.stat().st_size for path in paths)
