"""Write and read the files of a volume. All functions block; run them in threads."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.certificates.verification import (
    ExpectedCertificate,
    VerifiedCertificate,
    parse_certificate,
    verify_certificate,
)
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.file_format import RenderedFile, StorePassword, VolumeContents
from csi_driver.core.formats.layout import FileLayout
from csi_driver.core.formats.stored_contents import decode_contents, encode_contents
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.core.subject import Subject
from csi_driver.host.generations import VolumeFile, read_private, write_generation
from csi_driver.node.pods import Pod

_MAX_ISSUER_ROOTS = 10
_PASSWORD_BYTES = 32
_PUBLIC = 0o444


@dataclass(frozen=True, slots=True)
class FileAccess:
    """The owner, group and mode of private files. Public files belong to root, and every user can read them."""

    uid: int | None
    gid: int | None
    mode: int

    @classmethod
    def of(cls, spec: CertificateSpec, mount_group: int | None) -> FileAccess:
        """Return what the attributes set. ``mount_group`` is the pod's fsGroup; the attribute takes precedence over it.

        By default, the group can read private files if there is one, or else the owner. If the pod sets neither, every
        user of the pod can. Strict programs accept a group only if root owns the file.
        """
        gid = mount_group if spec.fs_group is None else spec.fs_group
        only_owner = spec.uid is not None and (gid is None or spec.layout.strict)
        default = 0o400 if only_owner else 0o440 if gid is not None else _PUBLIC
        return cls(spec.uid, gid, default if spec.key_mode is None else spec.key_mode)

    @property
    def is_strict(self) -> bool:
        """True if programs accept it that check the owner and the mode of a key, such as PostgreSQL."""
        return not self.mode & 0o007 and not (self.uid and self.mode & 0o070)

    def volume_file(self, file: RenderedFile) -> VolumeFile:
        if not file.private:
            return VolumeFile(file.name, file.content, _PUBLIC, None)
        return VolumeFile(file.name, file.content, self.mode, self.gid, self.uid)


@dataclass(frozen=True, slots=True)
class RenderedVolume:
    """All files of a volume, and the driver's own copy of what they represent."""

    files: Sequence[VolumeFile]
    private: Secret[bytes]

    @property
    def sizes(self) -> list[int]:
        """The sizes of all files in bytes."""
        return [len(content.reveal()) for content in (*(file.content for file in self.files), self.private)]


@dataclass(frozen=True, slots=True)
class VolumeFiles:
    """The files of a volume: their directory, which files there are, and who can read them.

    Certificates, keys, roots and passwords all change through :meth:`write_rendered`.
    """

    files_dir: Path
    layout: FileLayout
    access: FileAccess

    def render(self, contents: VolumeContents) -> RenderedVolume:
        """Render all formats."""
        files = [self.access.volume_file(file) for file in self.layout.render(contents)]
        return RenderedVolume(files, encode_contents(contents))

    def write(self, contents: VolumeContents, now: float) -> None:
        """Render all formats and write them, see :meth:`write_rendered`."""
        self.write_rendered(self.render(contents), now)

    def write_rendered(self, rendered: RenderedVolume, now: float) -> None:
        """Replace the files of the volume atomically. On failure the old files stay."""
        stamp = datetime.fromtimestamp(now, UTC).strftime("%Y_%m_%d_%H_%M_%S.%f")
        write_generation(self.files_dir, rendered.files, stamp, rendered.private)

    def renew(self, contents: VolumeContents, now: float) -> None:
        """Write a new key, chain and roots with the current password."""
        if self.layout.has_stores:
            contents = replace(contents, password=self._current_password())
        self.write(contents, now)

    def replace_roots(self, roots: Sequence[bytes], now: float) -> bool:
        """Write the current key and chain with these roots (X.509 DER). Return False if the volume already has the roots."""
        current, new_roots = self._current_contents(), parse_roots(roots)
        if current.roots == new_roots:
            return False
        self.write(replace(current, roots=new_roots), now)
        return True

    def replace_password(self, password: Secret[bytes], now: float) -> bool:
        """Write the current contents with a password of the pod. Return False if the volume already has the password."""
        current, new_password = read_contents(self.files_dir), StorePassword(password, generated=False)
        if current.password == new_password:
            return False
        self.write(replace(current, password=new_password), now)
        return True

    def _current_contents(self) -> VolumeContents:
        """Return what the files represent. If they are damaged, a volume with only roots has a new password and no roots."""
        try:
            return read_contents(self.files_dir)
        except CertmountError:
            if self.layout.has_certificate:  # the next renewal replaces it
                raise
            return VolumeContents(None, (), (), store_password(self.layout, None))

    def _current_password(self) -> StorePassword | None:
        """Return the password of the volume, or a new one if its files are damaged."""
        try:
            password = read_contents(self.files_dir).password
        except CertmountError:
            password = None
        return password or store_password(self.layout, None)


def store_password(layout: FileLayout, password: Secret[bytes] | None) -> StorePassword | None:
    """Return the password of a new volume: that of the pod, or else a random one. None if the volume has no store."""
    if not layout.has_stores:
        return None
    if password is not None:
        return StorePassword(password, generated=False)
    return StorePassword(Secret(secrets.token_urlsafe(_PASSWORD_BYTES).encode()), generated=True)


def read_contents(files_dir: Path) -> VolumeContents:
    """Read the current key, chain, roots and password, without verification.

    Raises CertmountError: InvalidResponse if they do not parse, or the error of the host if they cannot be read.
    """
    stored = read_private(files_dir)
    try:
        return decode_contents(stored)
    except ValueError:
        problem = "the driver's copy of the key, the certificates and the roots does not parse"
        raise CertmountError(Reason.INVALID_RESPONSE, Fault("volume", problem)) from None


def read_certificate(files_dir: Path, spec: CertificateSpec, pod: Pod, now: float) -> VerifiedCertificate:
    """Read the current certificate and verify it like a response of the authority.

    Raises CertmountError: InvalidResponse if it does not match ``spec``, or as :func:`read_key_and_chain`.
    """
    contents = read_contents(files_dir)
    # The issuer's roots precede those of the federations.
    chain, roots = _encode(contents.chain), _encode(contents.roots[:_MAX_ISSUER_ROOTS])
    expected = expected_certificate(_key_of(contents), spec, pod, spec.issuer)
    return verify_certificate(chain, roots, expected, datetime.fromtimestamp(now, UTC))


def read_key_and_chain(files_dir: Path) -> tuple[PrivateKey, list[bytes]]:
    """Read the current key and chain (X.509 DER), without verification.

    Raises as :func:`read_contents`, and InvalidResponse if the volume has no key.
    """
    contents = read_contents(files_dir)
    return _key_of(contents), _encode(contents.chain)


def _key_of(contents: VolumeContents) -> PrivateKey:
    if contents.key is None:
        raise CertmountError(Reason.INVALID_RESPONSE, Fault("volume", "has no key"))
    return contents.key


def expected_certificate(key: PrivateKey, spec: CertificateSpec, pod: Pod, signer: str) -> ExpectedCertificate:
    """Return what a certificate that ``signer`` issues for a volume of ``pod`` must match.

    Only the authority knows which names an external issuer can sign, so the SPIFFE ID is optional there.
    """
    external = signer != DEFAULT_ISSUER
    return ExpectedCertificate(
        key.public_key(),
        spec.names,
        pod.namespace,
        pod.service_account,
        identity_optional=external,
        spiffe=spec.spiffe,
        subject=Subject() if external else spec.subject,
    )


def parse_roots(ders: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    return tuple(map(parse_certificate, ders))


def _encode(certificates: Sequence[x509.Certificate]) -> list[bytes]:
    return [certificate.public_bytes(Encoding.DER) for certificate in certificates]
