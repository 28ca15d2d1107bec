"""Parse certificates of others. What cryptography raises for invalid input is, for the most part, not a ValueError."""

from __future__ import annotations

from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm

from csi_driver.core.certificates.der_bounds import check_certificate

PARSE_ERRORS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InternalError,  # for what only OpenSSL rejects, for example a private Ed25519 key of 33 bytes
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


def load_certificate(der: bytes) -> x509.Certificate:
    """Parse a DER certificate within limits of time. Only its public key and its extensions can still raise PARSE_ERRORS.

    Raises OutOfBounds, or another of PARSE_ERRORS.
    """
    check_certificate(der)
    certificate = x509.load_der_x509_certificate(der)
    # cryptography parses these when they are first read, which can be in a place that expects no error.
    _ = certificate.subject, certificate.issuer, certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return certificate


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Return True if the issuer's key signed the certificate, and the names match. Nothing else is checked."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *PARSE_ERRORS):
        return False
    return True


def extension_of(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    """Return an extension, or None if the certificate does not have it or its extensions cannot be parsed."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, *PARSE_ERRORS):
        return None
