"""Check the rest of a CSR for issuers that copy it: nothing may reach a certificate that the policy does not know."""

from __future__ import annotations

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS
from csi_driver.core.errors import Fault

_PURPOSES = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
_SYSTEM = "system:"
_UNSUPPORTED = "is not supported in certificates for pods"


def content_faults(request: ParsedCSR) -> list[Fault]:
    """Return a fault for everything in a CSR that must not be in the certificate."""
    csr = x509.load_der_x509_csr(request.der)
    try:
        faults = [_subject_fault(attribute, request) for attribute in csr.subject]
        faults += [_extension_fault(extension) for extension in csr.extensions]
    except PARSE_ERRORS:
        return [Fault("certificate signing request", "has an invalid subject or invalid extensions")]
    return [fault for fault in faults if fault is not None]


def _subject_fault(attribute: x509.NameAttribute[str | bytes], request: ParsedCSR) -> Fault | None:
    """Accept only a common name that is also a subject alternative name, which older scripts write."""
    field, value = f"subject {attribute.rfc4514_attribute_name}", str(attribute.value)
    if value.lower().startswith(_SYSTEM):
        return Fault(field, f"{value[:100]!r} is reserved for Kubernetes")
    if attribute.oid != NameOID.COMMON_NAME:
        return Fault(field, _UNSUPPORTED, "omit it")
    if value.lower() not in {str(name) for name in request.names}:
        return Fault(field, f"{value[:100]!r} is not among the subject alternative names", "add it to them")
    return None


def _extension_fault(extension: x509.Extension[x509.ExtensionType]) -> Fault | None:
    value, field = extension.value, f"extension {type(extension.value).__name__}"
    if isinstance(value, x509.SubjectAlternativeName):
        return None
    if isinstance(value, x509.BasicConstraints):
        return Fault(field, "requests a CA certificate") if value.ca else None
    if isinstance(value, x509.KeyUsage):
        wrong = value.content_commitment or value.data_encipherment or value.key_agreement
        wrong = wrong or value.key_cert_sign or value.crl_sign
        return Fault(field, "requests more than digital signature and key encipherment") if wrong else None
    if isinstance(value, x509.ExtendedKeyUsage):
        wrong = not set(value) <= _PURPOSES
        return Fault(field, "requests more than server auth and client auth") if wrong else None
    return Fault(f"extension {extension.oid.dotted_string}", _UNSUPPORTED, "omit it")
