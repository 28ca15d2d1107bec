"""Read the files of a volume, and recognize by their contents what they are. Keys and passwords never leave this module as text."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key, pkcs12

from csi_driver.core.bounded_json import loads_bounded
from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.certificates.parsing import PARSE_ERRORS, extension_of, load_certificate
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.formats.summary import SUMMARY_FILE
from csi_driver.core.secret import Secret
from csi_driver.host.directories import open_descriptor
from csi_driver.host.generations import DATA

_MAX_FILES = 64
_MAX_FILE_BYTES = 1 << 20
_MAX_PASSWORD_BYTES = 256
_PEM_KEY = re.compile(  # it stops at the next line of dashes, so each byte of a file is read once
    rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----(?:(?!-----).){1,65536}+-----END (?:[A-Z]+ )?PRIVATE KEY-----", re.DOTALL
)
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class VolumeFileContent:
    """A file, what it contains, and why its content cannot be used."""

    name: str
    mode: int
    uid: int
    gid: int
    kind: str = "unknown"
    certificates: Sequence[x509.Certificate] = ()
    key: PrivateKey | None = field(default=None, repr=False)
    summary: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def has_chain(self) -> bool:
        return bool(self.certificates) and not is_ca(self.certificates[0])


@dataclass(frozen=True, slots=True)
class _RawFile:
    name: str
    status: os.stat_result
    content: Secret[bytes] | None  # None if it cannot be read
    error: str = ""


def read_volume(directory: Path, password: Secret[bytes] | None = None) -> tuple[str, list[VolumeFileContent]]:
    """Return the generation (empty if there is none) and its files. ``password`` opens key stores, or else a file does.

    Raises CertmountError VolumeNotFound.
    """
    generation, raw = _read_files(directory)
    candidates = [password] if password else [each.content for each in raw if _may_be_password(each)]
    return generation, [_recognize(each, candidates) for each in raw]


def is_ca(certificate: x509.Certificate) -> bool:
    constraints = extension_of(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def _read_files(directory: Path) -> tuple[str, list[_RawFile]]:
    generation = ""
    with contextlib.suppress(OSError):
        generation = str((directory / DATA).readlink())
    try:
        # The files of one generation: a renewal can replace ..data meanwhile.
        with open_descriptor(directory / generation, os.O_RDONLY | os.O_DIRECTORY) as opened:
            with os.scandir(opened) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith(".."))
            if len(names) > _MAX_FILES:
                problem = f"{directory} has {len(names)} files; a volume has at most {_MAX_FILES}"
                raise CertmountError(Reason.VOLUME_NOT_FOUND, Fault("DIR", problem))
            return generation.lstrip("."), [each for name in names if (each := _read_file(opened, name)) is not None]
    except OSError as error:
        hint = "run the command as root" if isinstance(error, PermissionError) else ""
        fault = Fault("DIR", f"{directory} cannot be read: {error.strerror}", hint)
        raise CertmountError(Reason.VOLUME_NOT_FOUND, fault) from None


def _read_file(directory: int, name: str) -> _RawFile | None:
    """Return a regular file, or None for anything else, such as a link to nothing. Never waits for a FIFO."""
    try:
        status = os.stat(name, dir_fd=directory)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    try:
        with (
            open_descriptor(name, os.O_RDONLY | os.O_NONBLOCK, directory) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        return _RawFile(name, status, None, f"cannot be read: {error.strerror}")
    if len(content) > _MAX_FILE_BYTES:
        return _RawFile(name, status, None, f"has more than {_MAX_FILE_BYTES} bytes")
    return _RawFile(name, status, Secret(content))


def _may_be_password(raw: _RawFile) -> bool:
    content = raw.content.reveal() if raw.content else b""
    return (
        0 < len(content) <= _MAX_PASSWORD_BYTES
        and content.isascii()
        and b"-----" not in content
        and raw.name != SUMMARY_FILE
    )


def _recognize(raw: _RawFile, passwords: Sequence[Secret[bytes] | None]) -> VolumeFileContent:
    access: dict[str, Any] = {
        "mode": stat.S_IMODE(raw.status.st_mode),
        "uid": raw.status.st_uid,
        "gid": raw.status.st_gid,
    }
    if raw.content is None:
        return VolumeFileContent(raw.name, **access, problem=raw.error)
    content = raw.content.reveal()
    try:
        found = _parse(raw.name, content, [each for each in passwords if each])
    except _Unusable as error:
        return VolumeFileContent(raw.name, **access, problem=str(error))
    if found["kind"] == "unknown" and _may_be_password(raw):
        found = {"kind": "password"}
    return VolumeFileContent(raw.name, **access, **found)


class _Unusable(ValueError):
    """What is wrong with a file, in words that follow its name."""


@contextlib.contextmanager
def _named(problem: str) -> Iterator[None]:
    """Give an error of a parser its words."""
    try:
        yield
    except PARSE_ERRORS:
        raise _Unusable(problem) from None


def _parse(name: str, content: bytes, passwords: Sequence[Secret[bytes]]) -> dict[str, Any]:
    if name == SUMMARY_FILE:
        with _named("is not a valid JSON object"):
            return {"kind": "summary", "summary": dict(loads_bounded(content, max_bytes=_MAX_FILE_BYTES))}
    if b"-----BEGIN " in content:
        return _parse_pem(content)
    if content.startswith(b"\x30"):
        return _parse_der(content, passwords)
    return {"kind": "unknown"}


def _parse_pem(content: bytes) -> dict[str, Any]:
    with _named("has a certificate that is not valid"):
        certificates = decode_certificates(content) if _CERTIFICATE in content else []
    keys = _PEM_KEY.findall(content)
    if not certificates and not keys:
        raise _Unusable("has no complete certificate or private key")
    with _named("has a private key that is encrypted or not valid"):
        key = load_pem_private_key(keys[0], None, unsafe_skip_rsa_key_validation=True) if keys else None
    kind = "key and certificates" if keys and certificates else "private key" if keys else "certificates"
    return {"kind": kind, "certificates": certificates, "key": key}


def _parse_der(content: bytes, passwords: Sequence[Secret[bytes]]) -> dict[str, Any]:
    with contextlib.suppress(*PARSE_ERRORS):
        return {"kind": "certificate (DER)", "certificates": [load_certificate(content)]}
    with contextlib.suppress(*PARSE_ERRORS):
        key = load_der_private_key(content, None, unsafe_skip_rsa_key_validation=True)
        return {"kind": "private key (DER)", "key": key}
    for password in passwords:
        with contextlib.suppress(*PARSE_ERRORS):
            store = pkcs12.load_pkcs12(content, password.reveal())
            found = [each.certificate for each in (store.cert, *store.additional_certs) if each is not None]
            kind = "key store (PKCS#12)" if store.key else "trust store (PKCS#12)"
            return {"kind": kind, "certificates": found, "key": store.key}
    raise _Unusable(
        "is neither a certificate, a private key, nor a key store that a known password opens; use --password-file"
    )
