"""The internal CA's keys and certificates: a root that signs intermediates only, and an intermediate that signs leaves."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from csi_driver.core.keys import PrivateKey, PublicKey, encode_key
from csi_driver.core.secret import Secret

ROOT_LIFE = timedelta(days=3652)
INTERMEDIATE_LIFE = timedelta(days=365)
BACKDATE = timedelta(seconds=60)
"""So that a node whose clock is a little behind takes a new certificate at once."""
_RENEW_AT = 2 / 3
"""Of an intermediate's life; the third that is left is far longer than any leaf's life."""
_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True, slots=True)
class Signer:
    """A CA certificate with its key."""

    certificate: x509.Certificate
    key: PrivateKey


@dataclass(frozen=True, slots=True)
class Keyring:
    """A whole CA: the root has issued the intermediate."""

    root: Signer
    intermediate: Signer

    def wants_intermediate(self, now: datetime) -> bool:
        """True when the intermediate is past two thirds of its life."""
        certificate = self.intermediate.certificate
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        return now >= certificate.not_valid_before_utc + life * _RENEW_AT

    def with_new_intermediate(self, now: datetime) -> Keyring:
        """The same root over a new intermediate. Leaves of the old one stay valid, as each brings its own chain."""
        return replace(self, intermediate=_make_intermediate(self.root, now))

    @property
    def root_der(self) -> bytes:
        """The trusted certificate, X.509 DER."""
        return self.root.certificate.public_bytes(Encoding.DER)

    @property
    def root_pem(self) -> bytes:
        """The trusted certificate, PEM."""
        return self.root.certificate.public_bytes(Encoding.PEM)


def make_keyring(now: datetime) -> Keyring:
    """Makes a new CA: an EC P-384 root of ten years and an EC P-256 intermediate of one."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject("root")
    builder = _builder(subject, key.public_key(), now, now + ROOT_LIFE, path_length=1)
    root = Signer(builder.issuer_name(subject).sign(key, signing_hash(key)), key)
    return Keyring(root, _make_intermediate(root, now))


def dump_keyring(keyring: Keyring) -> Mapping[str, Secret[bytes]]:
    """The values for a store, PEM; :func:`csi_driver.authority.keyring_check.load_keyring` reads them back."""
    root, intermediate = keyring.root, keyring.intermediate
    return {
        "root.crt": Secret(keyring.root_pem),
        "root.key": encode_key(root.key),
        "intermediate.crt": Secret(intermediate.certificate.public_bytes(Encoding.PEM)),
        "intermediate.key": encode_key(intermediate.key),
    }


def signing_hash(key: PrivateKey) -> SHA256 | SHA384 | None:
    """The hash that fits the strength of a signing key; none for Ed25519 (RFC 8410) and ML-DSA (RFC 9881), which have their own."""
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        return None
    return SHA384() if isinstance(key, ec.EllipticCurvePrivateKey) and key.key_size > 256 else SHA256()


def _make_intermediate(root: Signer, now: datetime) -> Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + INTERMEDIATE_LIFE, root.certificate.not_valid_after_utc)
    builder = _builder(_subject("intermediate"), key.public_key(), now, until, path_length=0)
    identifier = root.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.issuer_name(root.certificate.subject).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    return Signer(builder.sign(root.key, signing_hash(root.key)), key)


def _subject(role: str) -> x509.Name:
    # A name of its own for each, so that people and path builders tell a new intermediate from the one before.
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "certmount"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"certmount {role} {secrets.token_hex(4)}"),
        ]
    )


def _builder(
    subject: x509.Name, key: PublicKey, now: datetime, until: datetime, *, path_length: int
) -> x509.CertificateBuilder:
    """What root and intermediate have in common (RFC 5280 sections 4.2.1.2, 4.2.1.3, 4.2.1.9); the issuer is missing."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
