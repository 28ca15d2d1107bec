"""Every change of a volume renders the files of all formats, so that none becomes stale."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.certificates.keys import generate_key, public_bytes
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.file_format import FileFormat, RenderedFile, VolumeContents
from csi_driver.core.formats.registry import FORMATS
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.node.volumes.volume_files import FileAccess, read_contents, replace_roots, write_files
from tests.support.scripted_authority import TestCA
from tests.unit.node.certificates import private_key

ONE, TWO = TestCA("one"), TestCA("two")
OPEN = FileAccess(None)


class KeystoreFormat:
    """A format with one file for the key, the chain and the roots."""

    def render(self, contents: VolumeContents) -> tuple[RenderedFile, ...]:
        return (RenderedFile("keystore", Secret(self.content(contents)), private=True),)

    @staticmethod
    def content(contents: VolumeContents) -> bytes:
        parts = [public_bytes(contents.key.public_key())]
        parts += [certificate.public_bytes(Encoding.DER) for certificate in (*contents.chain, *contents.roots)]
        return b"".join(parts)


KEYSTORE = KeystoreFormat()
BOTH: tuple[FileFormat, ...] = (*FORMATS, KEYSTORE)
CONTENTS = VolumeContents(private_key(), (ONE.certificate,), (ONE.certificate,))


def test_new_roots_change_the_files_of_every_format(tmp_path: Path) -> None:
    """The key and the chain stay."""
    write_files(tmp_path, CONTENTS, OPEN, 1.0, BOTH)
    assert replace_roots(tmp_path, [ONE.der, TWO.der], OPEN, 2.0, BOTH)
    expected = replace(CONTENTS, roots=(ONE.certificate, TWO.certificate))
    assert (tmp_path / "keystore").read_bytes() == KEYSTORE.content(expected)
    assert (tmp_path / "root.crt").read_bytes() == ONE.pem + TWO.pem
    found = read_contents(tmp_path)
    assert (found.chain, found.roots) == (expected.chain, expected.roots)
    assert public_bytes(found.key.public_key()) == public_bytes(CONTENTS.key.public_key())


def test_new_key_changes_the_files_of_every_format(tmp_path: Path) -> None:
    """A format that is no longer used is removed."""
    write_files(tmp_path, CONTENTS, OPEN, 1.0, BOTH)
    renewed = VolumeContents(generate_key(KeyType.EC_P256), (TWO.certificate,), (TWO.certificate,))
    write_files(tmp_path, renewed, OPEN, 2.0, BOTH)
    assert (tmp_path / "keystore").read_bytes() == KEYSTORE.content(renewed)
    assert (tmp_path / "site.crt").read_bytes() == TWO.pem
    write_files(tmp_path, renewed, OPEN, 3.0)
    assert not (tmp_path / "keystore").exists()


def test_same_roots_write_nothing(tmp_path: Path) -> None:
    """So applications do not reload their files."""
    write_files(tmp_path, CONTENTS, OPEN, 1.0)
    before = (tmp_path / "..data").readlink()
    assert not replace_roots(tmp_path, [ONE.der], OPEN, 2.0)
    assert (tmp_path / "..data").readlink() == before


@pytest.mark.parametrize("group, modes", [(None, (0o444, 0o444)), (2000, (0o440, 0o444))])
@pytest.mark.root
def test_only_private_files_belong_to_the_group(tmp_path: Path, group: int | None, modes: tuple[int, int]) -> None:
    """Those of every format. Without a group, all users of the pod can read them."""
    write_files(tmp_path, CONTENTS, FileAccess(group), 1.0, BOTH)
    for name in ("site.key", "site.pem", "keystore"):
        found = (tmp_path / name).stat()
        assert stat.S_IMODE(found.st_mode) == modes[0]
        assert group is None or found.st_gid == group
    for name in ("site.crt", "root.crt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == modes[1]


def test_unusable_files_raise_invalid_response(tmp_path: Path) -> None:
    """The next renewal replaces them."""
    write_files(tmp_path, CONTENTS, OPEN, 1.0)
    (tmp_path / "site.key").chmod(0o600)  # the test need not run as root
    (tmp_path / "site.key").write_bytes(b"garbage")
    with pytest.raises(CertmountError) as caught:
        read_contents(tmp_path)
    assert caught.value.reason is Reason.INVALID_RESPONSE
