"""What one certificate must be like, by itself, for every verifier to believe what it has signed."""

from __future__ import annotations

from collections.abc import Iterator

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, PublicKeyAlgorithmOID

from csi_driver.core.certificates.keys import authority_key_problem
from csi_driver.core.certificates.name_constraints import unsupported_kinds
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS

_UNDERSTOOD = frozenset(
    {
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.CERTIFICATE_POLICIES,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    }
)
"""Of the others a critical one could forbid what is issued here, and nobody would know before the handshake."""
_ANY = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
_BOTH_ENDS = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})


def ca_certificate_problems(certificate: x509.Certificate) -> list[str]:
    """All that is wrong with a CA's certificate, in words that follow its name; times and issuers are not looked at."""
    try:
        extensions, key = certificate.extensions, certificate.public_key()
    except PARSE_ERRORS:
        return ["has extensions or a key that can't be read"]
    return [*_key_problems(certificate, key), *_extension_problems(extensions)]


def _key_problems(certificate: x509.Certificate, key: object) -> Iterator[str]:
    if problem := authority_key_problem(key):
        yield f"has {problem}"
    elif certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        yield "has a key for RSA-PSS only, which many verifiers don't know; make it with a plain RSA key"


def _extension_problems(extensions: x509.Extensions) -> Iterator[str]:
    """RFC 5280 sections 4.2.1.2, 4.2.1.3, 4.2.1.9, 4.2.1.10 and 4.2.1.12; no key usage means any."""
    by_type = {type(extension.value): extension.value for extension in extensions}
    constraints = by_type.get(x509.BasicConstraints)
    usage = by_type.get(x509.KeyUsage)
    if not isinstance(constraints, x509.BasicConstraints) or not constraints.ca:
        yield "is not the certificate of a certificate authority"
    elif isinstance(usage, x509.KeyUsage) and not usage.key_cert_sign:
        yield "is not the certificate of a certificate authority: its key usage lacks keyCertSign"
    if x509.SubjectKeyIdentifier not in by_type:
        yield "has no subject key identifier, without which strict verifiers refuse it"
    ends = by_type.get(x509.ExtendedKeyUsage)
    if isinstance(ends, x509.ExtendedKeyUsage) and _ANY not in ends and not set(ends) >= _BOTH_ENDS:
        yield "has an extended key usage that leaves out TLS servers or TLS clients"
    bounds = by_type.get(x509.NameConstraints)
    if isinstance(bounds, x509.NameConstraints) and (kinds := unsupported_kinds(bounds)):
        yield f"constrains names of a kind that can't be checked here: {', '.join(kinds)}"
    for extension in extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            yield f"has the critical extension {extension.oid.dotted_string}, which can't be honoured here"
