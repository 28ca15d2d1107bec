"""What a request may hold beside key and names, for signers that copy from it: nothing that a pod's certificate should not have."""

from __future__ import annotations

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS
from csi_driver.core.errors import Fault

_PURPOSES = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
_SYSTEM = "system:"
_FOREIGN = "no certificate for pods has that"


def content_faults(request: ParsedCSR) -> list[Fault]:
    """Everything in a request that would not come out in the certificate, or should not."""
    csr = x509.load_der_x509_csr(request.der)
    try:
        faults = [_subject_fault(attribute, request) for attribute in csr.subject]
        faults += [_extension_fault(extension) for extension in csr.extensions]
    except PARSE_ERRORS:
        return [Fault("certificate signing request", "has a subject or extensions that cannot be read")]
    return [fault for fault in faults if fault is not None]


def _subject_fault(attribute: x509.NameAttribute[str | bytes], request: ParsedCSR) -> Fault | None:
    """A certificate has no subject but its first DNS name; scripts of old write that as CN."""
    field, value = f"subject {attribute.rfc4514_attribute_name}", str(attribute.value)
    if value.lower().startswith(_SYSTEM):
        return Fault(field, f"{value[:100]!r} is a name of Kubernetes' own")
    if attribute.oid != NameOID.COMMON_NAME:
        return Fault(field, _FOREIGN, "leave it away")
    if value.lower() not in {str(name) for name in request.names}:
        return Fault(field, f"{value[:100]!r} is not among the subject alternative names", "add it there, too")
    return None


def _extension_fault(extension: x509.Extension[x509.ExtensionType]) -> Fault | None:
    value, field = extension.value, f"extension {type(extension.value).__name__}"
    if isinstance(value, x509.SubjectAlternativeName):
        return None
    if isinstance(value, x509.BasicConstraints):
        return Fault(field, "asks for a certificate authority") if value.ca else None
    if isinstance(value, x509.KeyUsage):
        wrong = value.content_commitment or value.data_encipherment or value.key_agreement
        wrong = wrong or value.key_cert_sign or value.crl_sign
        return Fault(field, "asks for more than digital signature and key encipherment") if wrong else None
    if isinstance(value, x509.ExtendedKeyUsage):
        wrong = not set(value) <= _PURPOSES
        return Fault(field, "asks for more than server auth and client auth") if wrong else None
    return Fault(f"extension {extension.oid.dotted_string}", _FOREIGN, "leave it away")
