"""Sign leaf certificates. They contain exactly the extensions set here (RFC 5280 section 4.2), none from the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.authority.ca.key_pairs import BACKDATE, CAKeyPair, authority_key_identifier, key_usage, signing_hash
from csi_driver.core.certificates.csr import san_extension
from csi_driver.core.certificates.keys import PublicKey
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from csi_driver.core.spec import Usage

_PURPOSES = {Usage.SERVER: ExtendedKeyUsageOID.SERVER_AUTH, Usage.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH}
_MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1, ub-common-name


@dataclass(frozen=True, slots=True)
class Leaf:
    """The contents of a leaf certificate. It expires after ``lifetime`` and is backdated by one minute."""

    key: PublicKey
    names: Names
    lifetime: timedelta
    usages: Sequence[Usage]
    subject: bool = True  # if False, the subject is empty whatever the names are


def sign_leaf(leaf: Leaf, signer: CAKeyPair, now: datetime) -> x509.Certificate:
    """Sign a certificate that does not outlive its signer; raise CertmountError IssuerUnavailable if the signer expired."""
    not_after = min(now + leaf.lifetime, signer.certificate.not_valid_after_utc)
    if not_after <= now:
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the intermediate of the internal CA has expired")
    subject = _subject(leaf.names) if leaf.subject else x509.Name([])
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


def _subject(names: Names) -> x509.Name:
    if not names.dns or len(names.dns[0].text) > _MAX_COMMON_NAME:
        return x509.Name([])
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names.dns[0].text)])
