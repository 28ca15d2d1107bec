"""CA certificates with their keys: how a root is made, and an intermediate below it (RFC 5280 section 4.2)."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.x509.oid import ExtensionOID, NameOID

from csi_driver.core.certificates.keys import PrivateKey, PublicKey, generate_key_like

ROOT_LIFETIME = timedelta(days=3652)
INTERMEDIATE_LIFETIME = timedelta(days=365)
BACKDATE = timedelta(seconds=60)
"""So that a node whose clock is a little behind takes a new certificate at once."""
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
_OF_THE_KEY = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    }
)
"""What each certificate has of its own; all else that an administrator wrote into one is kept when it is renewed."""
_MAX_COMMON_NAME = 64
"""RFC 5280 appendix A.1, ub-common-name."""
_TAG = re.compile(r" [0-9a-f]{8}\Z")


@dataclass(frozen=True, slots=True)
class CAKeyPair:
    """A CA certificate with its key."""

    certificate: x509.Certificate
    key: PrivateKey


def make_root(
    role: str, key: PrivateKey, now: datetime, *, path_length: int, extra: Iterable[x509.ExtensionType] = ()
) -> CAKeyPair:
    """A self-signed certificate of ten years; ``role`` is in its name, ``extra`` are further extensions, critical."""
    subject = _subject(f"certmount {role}")
    builder = _builder(subject, key.public_key(), now, now + ROOT_LIFETIME, path_length=path_length)
    for value in extra:
        builder = builder.add_extension(value, critical=True)
    return CAKeyPair(builder.issuer_name(subject).sign(key, signing_hash(key)), key)


def make_intermediate(
    root: CAKeyPair, key: PrivateKey, now: datetime, extra: Iterable[x509.ExtensionType] = ()
) -> CAKeyPair:
    """A certificate of one year below ``root``, at most as long as that lives, which may sign leaves only."""
    further = [x509.Extension(value.oid, True, value) for value in extra]
    return _sign_below(root, key, now, _subject("certmount intermediate"), further)


def renew_intermediate(root: CAKeyPair, former: x509.Certificate, now: datetime) -> CAKeyPair:
    """A successor of ``former``: like it in its kind of key, its name but for a mark of its own, and its constraints."""
    key = generate_key_like(former.public_key())  # type: ignore[arg-type]  # of the kinds that a keyring was checked for
    further = [extension for extension in former.extensions if extension.oid not in _OF_THE_KEY]
    return _sign_below(root, key, now, _marked(former.subject), further)


def signing_hash(key: PrivateKey) -> SHA256 | SHA384 | SHA512 | None:
    """The hash that fits the strength of a signing key; none for Ed25519 (RFC 8410) and ML-DSA (RFC 9881), which have their own."""
    if isinstance(key, rsa.RSAPrivateKey):
        return SHA256()
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return None
    if key.key_size <= 256:
        return SHA256()
    return SHA384() if key.key_size <= 384 else SHA512()


def authority_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """What a certificate says of its issuer's key (RFC 5280 section 4.2.1.1)."""
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _sign_below(
    root: CAKeyPair,
    key: PrivateKey,
    now: datetime,
    subject: x509.Name,
    further: Sequence[x509.Extension[x509.ExtensionType]],
) -> CAKeyPair:
    until = min(now + INTERMEDIATE_LIFETIME, root.certificate.not_valid_after_utc)
    builder = _builder(subject, key.public_key(), now, until, path_length=0)
    builder = builder.issuer_name(root.certificate.subject).add_extension(
        authority_key_identifier(root.certificate), critical=False
    )
    for extension in further:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return CAKeyPair(builder.sign(root.key, signing_hash(root.key)), key)


def _subject(name: str) -> x509.Name:
    return _marked(
        x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "certmount"),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )
    )


def _marked(subject: x509.Name) -> x509.Name:
    """The name with a mark of its own, so that people and path builders tell a new certificate from the one before."""
    names = [item for item in subject if item.oid == NameOID.COMMON_NAME]
    stem = _TAG.sub("", str(names[-1].value) if names else "intermediate")
    mark = f" {secrets.token_hex(4)}"
    common_name = x509.NameAttribute(NameOID.COMMON_NAME, stem[: _MAX_COMMON_NAME - len(mark)] + mark)
    return x509.Name([*(item for item in subject if item.oid != NameOID.COMMON_NAME), common_name])


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
