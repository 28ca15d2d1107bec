"""Sign leaf certificates from DER parts that the leaf certificates of a signer share, in half of the time.

The first certificate of each kind is built by :func:`sign_leaf`. The parts are taken from it, and used for the next ones only if
they give the same bytes for the first one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.certificates import (
    BACKDATE,
    CAKeyPair,
    Leaf,
    expiry_of,
    sign_leaf,
    signing_hash,
    subject_of,
)
from csi_driver.core.certificates.der_bounds import DERReader
from csi_driver.core.certificates.keys import PrivateKey, public_bytes
from csi_driver.core.names import Names
from csi_driver.core.spec import Usage

_VERSION_3 = bytes.fromhex("a003020102")
_SEQUENCE, _INTEGER, _BITS, _OCTETS = 0x30, 0x02, 0x03, 0x04
_UTC_TIME, _GENERALIZED_TIME, _LAST_UTC_YEAR = 0x17, 0x18, 2049  # RFC 5280 section 4.1.2.5
_EXTENSIONS = 0xA3
_EMAIL, _DNS, _URI, _IP = 0x81, 0x82, 0x86, 0x87  # the tags of a GeneralName
_KEY_IDENTIFIER_OID = bytes.fromhex("0603551d0e")
_NAMES_OID, _CRITICAL = bytes.fromhex("0603551d11"), bytes.fromhex("0101ff")
_SHARED_EXTENSIONS = 4  # sign_leaf adds them first: basic constraints, key usages, and the authority key identifier


@dataclass(frozen=True, slots=True)
class LeafParts:
    """The DER that the certificates of a signer share."""

    algorithm: bytes
    issuer: bytes
    extensions: bytes

    @classmethod
    def of(cls, certificate: x509.Certificate) -> LeafParts:
        read = DERReader()
        _, _, algorithm, issuer, _, _, _, extensions = read.signed_part(certificate.public_bytes(Encoding.DER))
        shared = list(read.elements(read.first(extensions.content).content))[:_SHARED_EXTENSIONS]
        return cls(algorithm.encoded, issuer.encoded, b"".join(each.encoded for each in shared))

    def tbs(self, leaf: Leaf, serial: int, not_before: datetime, not_after: datetime) -> bytes:
        """Return the TBSCertificate (RFC 5280 section 4.1)."""
        key, subject = public_bytes(leaf.key), subject_of(leaf).public_bytes()
        identifier = hashlib.sha1(_key_bits(key), usedforsecurity=False).digest()
        critical = b"" if len(subject) > 2 else _CRITICAL
        names = encode(_OCTETS, encode(_SEQUENCE, _general_names(leaf.names)))
        extensions = (
            self.extensions
            + encode(_SEQUENCE, _NAMES_OID + critical + names)
            + encode(_SEQUENCE, _KEY_IDENTIFIER_OID + encode(_OCTETS, encode(_OCTETS, identifier)))
        )
        return encode(
            _SEQUENCE,
            _VERSION_3
            + encode(_INTEGER, serial.to_bytes(serial.bit_length() // 8 + 1))
            + self.algorithm
            + self.issuer
            + encode(_SEQUENCE, _time(not_before) + _time(not_after))
            + subject
            + key
            + encode(_EXTENSIONS, encode(_SEQUENCE, extensions)),
        )


class _Kind:
    """The certificates of a signer with the same usages, for RSA keys or others."""

    def __init__(self) -> None:
        self.known = False
        self.parts: LeafParts | None = None  # None: sign_leaf builds all certificates

    def learn(self, leaf: Leaf, now: datetime, certificate: x509.Certificate) -> None:
        parts = LeafParts.of(certificate)
        tbs = parts.tbs(leaf, certificate.serial_number, now - BACKDATE, certificate.not_valid_after_utc)
        self.known, self.parts = True, parts if tbs == certificate.tbs_certificate_bytes else None


def sign_leaf_der(leaf: Leaf, signer: CAKeyPair, now: datetime) -> bytes:
    """Return the DER of a certificate as :func:`sign_leaf` signs it; raises CertmountError likewise."""
    kind = _kind(signer.certificate, tuple(leaf.usages), isinstance(leaf.key, rsa.RSAPublicKey))
    if kind.parts is None:
        certificate = sign_leaf(leaf, signer, now)
        if not kind.known:
            kind.learn(leaf, now, certificate)
        return certificate.public_bytes(Encoding.DER)
    not_after = expiry_of(leaf, signer, now)
    tbs = kind.parts.tbs(leaf, x509.random_serial_number(), now - BACKDATE, not_after)
    signature = _sign(signer.key, tbs)
    return encode(_SEQUENCE, tbs + kind.parts.algorithm + encode(_BITS, b"\0" + signature))


@lru_cache(maxsize=32)
def _kind(_signer: x509.Certificate, _usages: Sequence[Usage], _rsa_key: bool) -> _Kind:
    return _Kind()


def _sign(key: PrivateKey, data: bytes) -> bytes:
    algorithm: Any = signing_hash(key)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(algorithm))
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(data, PKCS1v15(), algorithm)
    return key.sign(data)


def _key_bits(key: bytes) -> bytes:
    """Return the bits of a SubjectPublicKeyInfo, of which the key identifier is the SHA-1 (section 4.2.1.2)."""
    algorithm = _content_start(key, 0)
    bits = _content_start(key, algorithm) + key[algorithm + 1]  # an algorithm has less than 128 bytes
    return key[_content_start(key, bits) + 1 :]  # the first byte is the number of unused bits


def _content_start(data: bytes, position: int) -> int:
    length = data[position + 1]
    return position + 2 + (length - 0x80 if length >= 0x80 else 0)


def _general_names(names: Names) -> bytes:
    return b"".join(
        [
            *(encode(_DNS, name.text.encode("ascii")) for name in names.dns),
            *(encode(_URI, uri.text.encode("ascii")) for uri in names.uris),
            *(encode(_IP, ip.address.packed) for ip in names.ips),
            *(encode(_EMAIL, email.text.encode("ascii")) for email in names.emails),
        ]
    )


def _time(moment: datetime) -> bytes:
    if moment.year <= _LAST_UTC_YEAR:
        return encode(_UTC_TIME, moment.strftime("%y%m%d%H%M%SZ").encode("ascii"))
    return encode(_GENERALIZED_TIME, moment.strftime("%Y%m%d%H%M%SZ").encode("ascii"))


def encode(tag: int, content: bytes) -> bytes:
    """Return an element in DER (X.690 section 8.1)."""
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    size = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(size))) + size + content
