"""PEM (RFC 7468): what autocert's and every TLS library's users expect to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.certificates.keys import PrivateKey, encode_key
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS
from csi_driver.core.secret import Secret

ROOTS, CHAIN, KEY, BUNDLE = "root.crt", "site.crt", "site.key", "site.pem"
PRIVATE = frozenset({KEY, BUNDLE})
"""The files that hold the key; all others may be read by anyone."""


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """One file of a volume."""

    name: str
    content: Secret[bytes]

    @property
    def private(self) -> bool:
        """True for a file that holds the key."""
        return self.name in PRIVATE


def render_files(
    key: PrivateKey, chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]
) -> tuple[RenderedFile, ...]:
    """``root.crt``, ``site.crt`` (leaf, then intermediates), ``site.key`` (PKCS#8) and ``site.pem`` (key, then chain: one atomic read)."""
    key_pem, chain_pem = encode_key(key).reveal(), encode_certificates(chain)
    return (
        RenderedFile(ROOTS, Secret(encode_certificates(roots))),
        RenderedFile(CHAIN, Secret(chain_pem)),
        RenderedFile(KEY, Secret(key_pem)),
        RenderedFile(BUNDLE, Secret(key_pem + chain_pem)),
    )


def encode_certificates(certificates: Sequence[x509.Certificate]) -> bytes:
    """The certificates in PEM, one after another."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def decode_certificates(pem: bytes) -> list[x509.Certificate]:
    """Reads PEM certificates; raises ValueError where there is none or one is broken."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except PARSE_ERRORS as error:
        raise ValueError("not certificates in PEM") from error


def fingerprint(certificate: x509.Certificate) -> str:
    """``SHA256:AB:CD:...``: the hex that ``openssl x509 -noout -fingerprint -sha256`` prints, for people who compare."""
    return "SHA256:" + certificate.fingerprint(SHA256()).hex(":").upper()
