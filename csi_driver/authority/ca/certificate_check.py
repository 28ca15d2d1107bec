"""Checks of a single CA certificate: would every verifier accept the certificates that it signs?"""

from __future__ import annotations

from collections.abc import Iterator

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, PublicKeyAlgorithmOID

from csi_driver.core.certificates.keys import authority_key_problem
from csi_driver.core.certificates.name_constraints import unsupported_kinds
from csi_driver.core.certificates.parsing import PARSE_ERRORS

_SUPPORTED_EXTENSIONS = (
    x509.AuthorityKeyIdentifier,
    x509.BasicConstraints,
    x509.CertificatePolicies,
    x509.ExtendedKeyUsage,
    x509.KeyUsage,
    x509.NameConstraints,
    x509.SubjectAlternativeName,
    x509.SubjectKeyIdentifier,
)
"""Any other critical extension could forbid the certificates that certmount issues, and only a handshake would show it."""
_ANY = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
_TLS = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})


def ca_certificate_problems(certificate: x509.Certificate) -> list[str]:
    """Return everything that is wrong with a CA certificate, except its validity and issuer, in words that follow its name."""
    try:
        extensions, key = certificate.extensions, certificate.public_key()
    except PARSE_ERRORS:
        return ["has extensions or a key that can't be parsed"]
    return [*_key_problems(certificate, key), *_extension_problems(extensions)]


def _key_problems(certificate: x509.Certificate, key: object) -> Iterator[str]:
    if problem := authority_key_problem(key):
        yield f"has {problem}"
    elif certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        yield "has a key for RSA-PSS only, which many verifiers don't support; use a plain RSA key"


def _extension_problems(extensions: x509.Extensions) -> Iterator[str]:
    """RFC 5280 sections 4.2.1.2, 4.2.1.3, 4.2.1.9, 4.2.1.10 and 4.2.1.12. A missing key usage allows any use."""
    by_type = {type(extension.value): extension.value for extension in extensions}
    basic = by_type.get(x509.BasicConstraints)
    usage = by_type.get(x509.KeyUsage)
    if not isinstance(basic, x509.BasicConstraints) or not basic.ca:
        yield "is not a CA certificate"
    elif isinstance(usage, x509.KeyUsage) and not usage.key_cert_sign:
        yield "is not a CA certificate: its key usage lacks keyCertSign"
    if x509.SubjectKeyIdentifier not in by_type:
        yield "has no subject key identifier; strict verifiers reject it"
    purposes = by_type.get(x509.ExtendedKeyUsage)
    if isinstance(purposes, x509.ExtendedKeyUsage) and _ANY not in purposes and not set(purposes) >= _TLS:
        yield "has an extended key usage that excludes TLS servers or TLS clients"
    constraints = by_type.get(x509.NameConstraints)
    if isinstance(constraints, x509.NameConstraints) and (kinds := unsupported_kinds(constraints)):
        yield f"has name constraints of a type that certmount can't check: {', '.join(kinds)}"
    for extension in extensions:
        if extension.critical and not isinstance(extension.value, _SUPPORTED_EXTENSIONS):
            yield f"has the critical extension {extension.oid.dotted_string}, which certmount doesn't support"
