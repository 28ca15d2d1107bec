"""Write and read the files of a volume. All functions block; run them in threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.keys import PrivateKey, load_key
from csi_driver.core.certificates.verification import ExpectedCertificate, VerifiedCertificate, verify_certificate
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.file_format import FileFormat, RenderedFile, VolumeContents
from csi_driver.core.formats.pem import CHAIN, KEY, ROOTS, decode_certificates
from csi_driver.core.formats.registry import FORMATS, render_files
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.host.generations import VolumeFile, read_generation, write_generation
from csi_driver.node.pods import Pod

_MAX_ISSUER_ROOTS = 10


@dataclass(frozen=True, slots=True)
class FileAccess:
    """Who can read private files: root and ``group``, or every user of the pod if ``group`` is None."""

    group: int | None

    def volume_file(self, file: RenderedFile) -> VolumeFile:
        if not file.private or self.group is None:
            return VolumeFile(file.name, file.content, 0o444, None)
        return VolumeFile(file.name, file.content, 0o440, self.group)


def write_files(
    files_dir: Path, contents: VolumeContents, access: FileAccess, now: float, formats: Sequence[FileFormat] = FORMATS
) -> None:
    """Render all formats and replace the files of the volume atomically. On failure the old files stay.

    This is the only way to write files: certificates, keys and roots all change through it.
    """
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y_%m_%d_%H_%M_%S.%f")
    write_generation(files_dir, [access.volume_file(file) for file in render_files(contents, formats)], stamp)


def write_certificate(
    files_dir: Path,
    key: PrivateKey,
    chain: Sequence[x509.Certificate],
    roots: Sequence[bytes],
    access: FileAccess,
    now: float,
) -> None:
    """Write a new key, chain and roots (X.509 DER), see :func:`write_files`."""
    write_files(files_dir, VolumeContents(key, tuple(chain), _parse(roots)), access, now)


def replace_roots(
    files_dir: Path, roots: Sequence[bytes], access: FileAccess, now: float, formats: Sequence[FileFormat] = FORMATS
) -> bool:
    """Write the current key and chain with these roots (X.509 DER). Return False if the volume already has the roots."""
    current, new_roots = read_contents(files_dir), _parse(roots)
    if current.roots == new_roots:
        return False
    write_files(files_dir, VolumeContents(current.key, current.chain, new_roots), access, now, formats)
    return True


def read_contents(files_dir: Path) -> VolumeContents:
    """Read the current key, chain and roots, without verification.

    Raises CertmountError: InvalidResponse if the files do not parse, or the error of the host if they cannot be read.
    """
    files = read_generation(files_dir)
    try:
        chain, roots = (tuple(decode_certificates(files[name])) for name in (CHAIN, ROOTS))
        return VolumeContents(load_key(Secret(files[KEY])), chain, roots)
    except (KeyError, ValueError):
        problem = f"{KEY}, {CHAIN} or {ROOTS} is missing or does not parse"
        raise CertmountError(Reason.INVALID_RESPONSE, Fault("volume", problem)) from None


def read_certificate(files_dir: Path, spec: CertificateSpec, pod: Pod, now: float) -> VerifiedCertificate:
    """Read the current certificate and verify it like a response of the authority.

    Raises CertmountError: InvalidResponse if it does not match ``spec``, or as :func:`read_contents`.
    """
    contents = read_contents(files_dir)
    # The issuer's roots precede those of the federations.
    chain, roots = _encode(contents.chain), _encode(contents.roots[:_MAX_ISSUER_ROOTS])
    expected = expected_certificate(contents.key, spec, pod, spec.issuer)
    return verify_certificate(chain, roots, expected, datetime.fromtimestamp(now, UTC))


def read_key_and_chain(files_dir: Path) -> tuple[PrivateKey, list[bytes]]:
    """Read the current key and chain (X.509 DER), without verification; raises as :func:`read_contents`."""
    contents = read_contents(files_dir)
    return contents.key, _encode(contents.chain)


def expected_certificate(key: PrivateKey, spec: CertificateSpec, pod: Pod, signer: str) -> ExpectedCertificate:
    """Return what a certificate that ``signer`` issues for a volume of ``pod`` must match.

    Only the authority knows which names an external issuer can sign, so the SPIFFE ID is optional there.
    """
    external = signer != DEFAULT_ISSUER
    return ExpectedCertificate(
        key.public_key(), spec.names, pod.namespace, pod.service_account, identity_optional=external
    )


def _parse(ders: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    return tuple(x509.load_der_x509_certificate(der) for der in ders)


def _encode(certificates: Sequence[x509.Certificate]) -> list[bytes]:
    return [certificate.public_bytes(Encoding.DER) for certificate in certificates]
