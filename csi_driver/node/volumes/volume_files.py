"""What lies in a volume: written as one generation, read back, its roots exchanged. Blocking; runs in threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.certificates.keys import PrivateKey, load_key
from csi_driver.core.certificates.verification import ExpectedCertificate, VerifiedCertificate, verify_certificate
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import (
    CHAIN,
    KEY,
    PRIVATE,
    ROOTS,
    decode_certificates,
    encode_certificates,
    render_files,
)
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, CertificateSpec
from csi_driver.host.generations import VolumeFile, read_generation, write_generation
from csi_driver.node.pods import Pod

_MOST_ROOTS = 10
"""As many as one set may have."""


@dataclass(frozen=True, slots=True)
class FileAccess:
    """Who may read the key: a group (then root and that group only), or with None every user of the pod."""

    group: int | None

    def file(self, name: str, content: Secret[bytes]) -> VolumeFile:
        """The file with its mode and group."""
        if name not in PRIVATE or self.group is None:
            return VolumeFile(name, content, 0o444, None)
        return VolumeFile(name, content, 0o440, self.group)


def write_certificate(
    files_dir: Path,
    key: PrivateKey,
    chain: Sequence[x509.Certificate],
    roots: Sequence[bytes],
    readers: FileAccess,
    now: float,
) -> None:
    """Writes a new generation with key, chain and roots (X.509 DER); the old one stays whole if that fails."""
    rendered = render_files(key, chain, _parsed(roots))
    write_generation(files_dir, [readers.file(file.name, file.content) for file in rendered], _stamp(now))


def replace_roots(files_dir: Path, roots: Sequence[bytes], readers: FileAccess, now: float) -> bool:
    """Writes the present key and certificate again with other roots (X.509 DER); False where they are the same already."""
    files, wanted = read_generation(files_dir), encode_certificates(_parsed(roots))
    if files.get(ROOTS) == wanted:
        return False
    files[ROOTS] = wanted
    write_generation(files_dir, [readers.file(name, Secret(content)) for name, content in files.items()], _stamp(now))
    return True


def read_certificate(files_dir: Path, spec: CertificateSpec, pod: Pod, now: float) -> VerifiedCertificate:
    """Reads the present generation and judges it as if the authority had just sent it.

    Raises:
        CertmountError: InvalidResponse where it is not a certificate that fits; or the volume can't be read.
    """
    key, chain, roots = _read(files_dir)
    # The issuer's roots come first, before those of federations.
    return verify_certificate(
        chain, roots[:_MOST_ROOTS], expected_certificate(key, spec, pod, spec.issuer), datetime.fromtimestamp(now, UTC)
    )


def read_key_and_chain(files_dir: Path) -> tuple[PrivateKey, list[bytes]]:
    """Reads the present key and chain (X.509 DER), unchecked; raises CertmountError as :func:`read_certificate`."""
    key, chain, _ = _read(files_dir)
    return key, chain


def expected_certificate(key: PrivateKey, spec: CertificateSpec, pod: Pod, signer: str) -> ExpectedCertificate:
    """What a certificate for a pod's volume must fit that ``signer`` has issued."""
    # Which names an issuer outside can sign is the authority's to know; that it signs no others is checked in any case.
    outside = signer != DEFAULT_ISSUER
    return ExpectedCertificate(
        key.public_key(), spec.names, pod.namespace, pod.service_account, identity_optional=outside
    )


def _read(files_dir: Path) -> tuple[PrivateKey, list[bytes], list[bytes]]:
    files = read_generation(files_dir)
    try:
        key = load_key(Secret(files[KEY]))
        chain, roots = (
            [certificate.public_bytes(Encoding.DER) for certificate in decode_certificates(files[name])]
            for name in (CHAIN, ROOTS)
        )
    except (KeyError, ValueError):
        raise CertmountError(
            Reason.INVALID_RESPONSE, Fault("volume", "its files are not a key, a chain and roots")
        ) from None
    return key, chain, roots


def _parsed(ders: Sequence[bytes]) -> list[x509.Certificate]:
    return [x509.load_der_x509_certificate(der) for der in ders]


def _stamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y_%m_%d_%H_%M_%S.%f")
