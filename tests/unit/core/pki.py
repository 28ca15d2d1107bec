"""Certificates for tests, including invalid ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from csi_driver.core.certificates.csr import san_extension
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.names import URI, DNSName, EmailAddress, IPAddress, Names
from csi_driver.core.spec import KeyType
from tests.unit.core.policy.reference import kind_of

NOW = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
SPIFFE = "spiffe://cluster.local/ns/web/sa/edge"
KEY_USAGES = """
digital_signature content_commitment key_encipherment data_encipherment key_agreement
key_cert_sign crl_sign encipher_only decipher_only
"""


def key_usage(*set_usages: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in set_usages for usage in KEY_USAGES.split()})


CA_USAGE = key_usage("key_cert_sign", "crl_sign")
LARGEST_DNS = [f"{number:03}.{'.'.join(['a' * 63] * 3)}.{'b' * 57}" for number in range(84)]
LARGEST_URIS = [f"https://example.com/{number:03}{'a' * 2020}" for number in range(16)]
"""The longest names and the largest number of them that the attributes allow."""


OTHER_KEYS: dict[str, Callable[[], Any]] = {
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "brainpool": lambda: ec.generate_private_key(ec.BrainpoolP256R1()),
    "RSA-1024": lambda: rsa.generate_private_key(65537, 1024),  # noqa: S505  # weak on purpose
    "RSA-2048 with e=3": lambda: rsa.generate_private_key(3, 2048),
    "DSA": lambda: dsa.generate_private_key(2048),
    "Ed448": ed448.Ed448PrivateKey.generate,
    "X25519": x25519.X25519PrivateKey.generate,
}
"""Keys that certmount does not support."""


@functools.cache
def key_of(kind: KeyType, number: int = 0) -> PrivateKey:
    """Return a cached key, because RSA keys are slow to generate."""
    del number
    return generate_key(kind)


def names(*texts: str) -> Names:
    return Names.of(
        [DNSName.parse(text) for text in texts if kind_of(text) == "dns"],
        [URI.parse(text) for text in texts if kind_of(text) == "uris"],
        [IPAddress.parse(text) for text in texts if kind_of(text) == "ips"],
        [EmailAddress.parse(text) for text in texts if kind_of(text) == "emails"],
    )


def der(*certificates: x509.Certificate) -> list[bytes]:
    return [certificate.public_bytes(Encoding.DER) for certificate in certificates]


@dataclass(frozen=True, slots=True)
class Validity:
    """Start and end, relative to :data:`NOW`."""

    start: timedelta = -HOUR
    end: timedelta = HOUR


@dataclass(frozen=True, slots=True)
class Signer:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: PrivateKey


def authority(
    name: str,
    parent: Signer | None = None,
    *,
    key: PrivateKey | None = None,
    path_length: int | None = None,
    ca: bool = True,
    validity: Validity = Validity(),
    extensions: Sequence[x509.ExtensionType] = (CA_USAGE,),
) -> Signer:
    """Return a root (without a parent) or an intermediate."""
    key = key or generate_key(KeyType.EC_P256)
    constraints = x509.BasicConstraints(ca=ca, path_length=path_length)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(key, validity).subject_name(subject)
    builder = _issuer(builder, parent) if parent else builder.issuer_name(subject)
    for extension in (constraints, *extensions):
        builder = builder.add_extension(extension, critical=True)
    if not any(isinstance(extension, x509.SubjectKeyIdentifier) for extension in extensions):
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Signer(sign(builder, parent.key if parent else key), key)


def leaf(
    parent: Signer,
    key: PrivateKey,
    wanted: Names,
    *,
    validity: Validity = Validity(),
    extensions: Sequence[x509.ExtensionType] = (),
    critical: bool = True,
) -> x509.Certificate:
    """Return a pod's certificate; ``critical`` applies to ``extensions``."""
    builder = _issuer(_builder(key, validity), parent).subject_name(x509.Name([]))
    if wanted:
        builder = builder.add_extension(san_extension(wanted), critical=True)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return sign(builder, parent.key)


def sign(builder: x509.CertificateBuilder, key: PrivateKey) -> x509.Certificate:
    return builder.sign(key, SHA256() if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) else None)


def _builder(key: PrivateKey, validity: Validity) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + validity.start)
        .not_valid_after(NOW + validity.end)
    )


def _issuer(builder: x509.CertificateBuilder, parent: Signer) -> x509.CertificateBuilder:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(parent.key.public_key())
    return builder.issuer_name(parent.certificate.subject).add_extension(identifier, critical=False)
