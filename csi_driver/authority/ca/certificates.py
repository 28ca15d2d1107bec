"""Create certificates (RFC 5280 section 4.2): self-signed roots, intermediates, and leaf certificates."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.core.certificates.csr import san_extension
from csi_driver.core.certificates.keys import PrivateKey, PublicKey, generate_key_like
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from csi_driver.core.spec import Usage

ROOT_LIFETIME = timedelta(days=3652)
INTERMEDIATE_LIFETIME = timedelta(days=365)
BACKDATE = timedelta(seconds=60)  # A node whose clock is up to a minute slow accepts a new certificate immediately
# A renewed intermediate gets its own values of these extensions and keeps all others of its predecessor.
_NOT_COPIED = (x509.BasicConstraints, x509.KeyUsage, x509.SubjectKeyIdentifier, x509.AuthorityKeyIdentifier)
_MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1, ub-common-name
_PURPOSES = {Usage.SERVER: ExtendedKeyUsageOID.SERVER_AUTH, Usage.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH}
_SUFFIX = re.compile(r" [0-9a-f]{8}\Z")


@dataclass(frozen=True, slots=True)
class CAKeyPair:
    """A CA certificate with its signing key.

    ``key`` is used only to sign and to return its public key. For a key in an HSM (PKCS#11) or a key service (Vault),
    implement one of cryptography's abstract private key classes, for example ``ec.EllipticCurvePrivateKey``: its
    ``sign`` method calls the key store. A :class:`~csi_driver.authority.ca.sources.CASource` then returns such a pair.
    The internal issuer calls ``sign`` in the event loop, so a key store with slow signatures needs a thread there.
    """

    certificate: x509.Certificate
    key: PrivateKey


def make_root(
    role: str, key: PrivateKey, now: datetime, *, path_length: int, extra: Iterable[x509.ExtensionType] = ()
) -> CAKeyPair:
    """Create a self-signed certificate for ten years with ``role`` in its subject and critical ``extra`` extensions."""
    subject = _subject(f"certmount {role}")
    builder = _builder(subject, key.public_key(), now, now + ROOT_LIFETIME, path_length=path_length)
    for value in extra:
        builder = builder.add_extension(value, critical=True)
    return CAKeyPair(builder.issuer_name(subject).sign(key, signing_hash(key)), key)


def make_intermediate(
    root: CAKeyPair, key: PrivateKey, now: datetime, extra: Iterable[x509.ExtensionType] = ()
) -> CAKeyPair:
    """Create an intermediate for one year, at most until the root expires, that can sign leaf certificates only."""
    extensions = [x509.Extension(value.oid, True, value) for value in extra]
    return _sign_intermediate(root, key, now, _subject("certmount intermediate"), extensions)


def renew_intermediate(root: CAKeyPair, former: x509.Certificate, now: datetime) -> CAKeyPair:
    """Create a successor with a new key of the same type, the same constraints, and the same name with a new suffix."""
    key = generate_key_like(former.public_key())  # type: ignore[arg-type]  # the keyring loader checked the type
    extensions = [extension for extension in former.extensions if not isinstance(extension.value, _NOT_COPIED)]
    return _sign_intermediate(root, key, now, _with_suffix(former.subject), extensions)


def signing_hash(key: PrivateKey) -> SHA256 | SHA384 | SHA512 | None:
    """Return the hash that matches the strength of the key; None for Ed25519 (RFC 8410) and ML-DSA (RFC 9881)."""
    if isinstance(key, rsa.RSAPrivateKey):
        return SHA256()
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return None
    if key.key_size <= 256:
        return SHA256()
    return SHA384() if key.key_size <= 384 else SHA512()


def key_usage(*, encipher: bool = False, ca: bool = False) -> x509.KeyUsage:
    """Return the key usage of a CA, or of a leaf certificate whose RSA key can also encipher keys."""
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=encipher,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def authority_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """Return the extension that identifies the issuer's key (RFC 5280 section 4.2.1.1)."""
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _sign_intermediate(
    root: CAKeyPair,
    key: PrivateKey,
    now: datetime,
    subject: x509.Name,
    extensions: Iterable[x509.Extension[x509.ExtensionType]],
) -> CAKeyPair:
    not_after = min(now + INTERMEDIATE_LIFETIME, root.certificate.not_valid_after_utc)
    builder = _builder(subject, key.public_key(), now, not_after, path_length=0)
    builder = builder.issuer_name(root.certificate.subject).add_extension(
        authority_key_identifier(root.certificate), critical=False
    )
    for extension in extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return CAKeyPair(builder.sign(root.key, signing_hash(root.key)), key)


def _subject(common_name: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "certmount")
    return _with_suffix(x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))


def _with_suffix(subject: x509.Name) -> x509.Name:
    """Return the name with a new random suffix: path builders must not confuse two certificates of the same subject."""
    names = [item for item in subject if item.oid == NameOID.COMMON_NAME]
    stem = _SUFFIX.sub("", str(names[-1].value) if names else "intermediate")
    suffix = f" {secrets.token_hex(4)}"
    common_name = x509.NameAttribute(NameOID.COMMON_NAME, stem[: _MAX_COMMON_NAME - len(suffix)] + suffix)
    return x509.Name([*(item for item in subject if item.oid != NameOID.COMMON_NAME), common_name])


def _builder(
    subject: x509.Name, key: PublicKey, now: datetime, not_after: datetime, *, path_length: int
) -> x509.CertificateBuilder:
    """Return what roots and intermediates share (RFC 5280 sections 4.2.1.2, 4.2.1.3, 4.2.1.9), without an issuer."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


@dataclass(frozen=True, slots=True)
class Leaf:
    """The contents of a leaf certificate. It expires after ``lifetime`` and is backdated by one minute."""

    key: PublicKey
    names: Names
    lifetime: timedelta
    usages: Sequence[Usage]
    subject: x509.Name | None = None  # None: the first DNS name is the common name, if it fits


def sign_leaf(leaf: Leaf, signer: CAKeyPair, now: datetime) -> x509.Certificate:
    """Sign a certificate that does not outlive its signer; raise CertmountError IssuerUnavailable if the signer expired."""
    not_after, subject = expiry_of(leaf, signer, now), subject_of(leaf)
    builder = (
        _common(signer.certificate, tuple(leaf.usages), isinstance(leaf.key, rsa.RSAPublicKey))
        .subject_name(subject)
        .public_key(leaf.key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(not_after)
        # Critical if the subject is empty, because only these names then identify the holder (section 4.2.1.6).
        .add_extension(san_extension(leaf.names), critical=not subject.rdns)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(leaf.key), critical=False)
    )
    return builder.sign(signer.key, signing_hash(signer.key))


def expiry_of(leaf: Leaf, signer: CAKeyPair, now: datetime) -> datetime:
    """Return the end of its lifetime or of the signer's; raises CertmountError IssuerUnavailable if that has passed."""
    not_after = min(now + leaf.lifetime, signer.certificate.not_valid_after_utc)
    if not_after <= now:
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, "a certificate of the internal CA has expired")
    return not_after


def subject_of(leaf: Leaf) -> x509.Name:
    return _default_subject(leaf.names) if leaf.subject is None else leaf.subject


def _default_subject(names: Names) -> x509.Name:
    text = names.dns[0].text if names.dns else ""
    fits = 0 < len(text) <= _MAX_COMMON_NAME
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if fits else [])


@lru_cache(maxsize=32)  # a signer has one entry for each combination of usages and RSA or not
def _common(signer: x509.Certificate, usages: tuple[Usage, ...], rsa_key: bool) -> x509.CertificateBuilder:
    """Return what the leaf certificates of a signer share. Builders are immutable, so it can be cached."""
    return (
        x509.CertificateBuilder()
        .issuer_name(signer.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # Peers that use TLS 1.2 with RSA key exchange need to encipher keys.
        .add_extension(key_usage(encipher=rsa_key), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_PURPOSES[usage] for usage in usages]), critical=False)
        .add_extension(authority_key_identifier(signer), critical=False)
    )
