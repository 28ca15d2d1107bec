"""PEM (RFC 7468): the format that every TLS library reads, with the file names of autocert."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.certificates.keys import encode_key
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS
from csi_driver.core.formats.file_format import RenderedFile, VolumeContents
from csi_driver.core.secret import Secret

ROOTS, CHAIN, KEY, BUNDLE = "root.crt", "site.crt", "site.key", "site.pem"


class PEMFormat:
    """Four PEM files: the roots, the certificate chain, the PKCS#8 key, and the key and chain in one file.

    ``site.pem`` lets an application read a matching key and certificate with one read.
    """

    def render(self, contents: VolumeContents) -> tuple[RenderedFile, ...]:
        key, chain = encode_key(contents.key).reveal(), encode_certificates(contents.chain)
        return (
            RenderedFile(ROOTS, Secret(encode_certificates(contents.roots)), private=False),
            RenderedFile(CHAIN, Secret(chain), private=False),
            RenderedFile(KEY, Secret(key), private=True),
            RenderedFile(BUNDLE, Secret(key + chain), private=True),
        )


def encode_certificates(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def decode_certificates(pem: bytes) -> list[x509.Certificate]:
    """Parse PEM certificates. Raises ValueError if there is none or one is malformed."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except PARSE_ERRORS as error:
        raise ValueError("not certificates in PEM") from error


def fingerprint(certificate: x509.Certificate) -> str:
    """Return ``SHA256:AB:CD:...``, the value that ``openssl x509 -noout -fingerprint -sha256`` prints."""
    return "SHA256:" + certificate.fingerprint(SHA256()).hex(":").upper()
