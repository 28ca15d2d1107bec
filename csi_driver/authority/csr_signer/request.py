"""What a request asks for, read with care: what would not come out in the certificate is refused, never left out in silence."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import timedelta

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.core.cluster_csr import DIGITAL_SIGNATURE, KEY_ENCIPHERMENT, PURPOSES, ClusterCSR
from csi_driver.core.csr import SigningRequest, parse_csr
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.policy import Asked
from csi_driver.core.spec import Usage
from csi_driver.core.unreadable import UNREADABLE

_PEM = re.compile(
    rb"\s*-----BEGIN CERTIFICATE REQUEST-----\s*(?P<body>[A-Za-z0-9+/=\s]+)-----END CERTIFICATE REQUEST-----\s*"
)
_USAGES = {word: usage for usage, word in PURPOSES.items()}
_HARMLESS = {*_USAGES, DIGITAL_SIGNATURE, KEY_ENCIPHERMENT}
_PURPOSE_OIDS = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
_SYSTEM = "system:"


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that is well formed, whoever has made it."""

    request: SigningRequest
    usages: tuple[Usage, ...]
    duration: timedelta | None

    @property
    def asked(self) -> Asked:
        """In the policy's words: the issuer is the internal CA, which this signer is a way to."""
        return Asked(self.request.names, self.request.key_type, self.usages, self.duration)


def read_wish(csr: ClusterCSR) -> Wish:
    """Checks all that can be seen in the request itself.

    Raises:
        CertmountError: InvalidCSR, with everything that is wrong once the request can be read.
    """
    faults: list[Fault] = []
    if foreign := [usage for usage in csr.usages if usage not in _HARMLESS]:
        hint = f"it may have {', '.join(sorted(_HARMLESS))}"
        faults.append(Fault("spec.usages", f"{', '.join(foreign)} is not for pods", hint))
    usages = tuple(usage for word, usage in _USAGES.items() if word in csr.usages)
    if not usages:
        faults.append(Fault("spec.usages", "says neither server auth nor client auth"))
    der = _only_block(csr.request)
    if der is None:
        problem = "is not exactly one PEM block CERTIFICATE REQUEST with nothing beside it"
        raise CertmountError(Reason.INVALID_CSR, *faults, Fault("spec.request", problem))
    try:
        request = parse_csr(der)
    except CertmountError as error:
        raise CertmountError(Reason.INVALID_CSR, *faults, *error.faults) from None
    faults += _content_faults(x509.load_der_x509_csr(der), request)
    if faults:
        raise CertmountError(Reason.INVALID_CSR, *faults)
    return Wish(request, usages, None if csr.life_s is None else timedelta(seconds=csr.life_s))


def _only_block(pem: bytes) -> bytes | None:
    """The DER of the one PEM block there is; readers differ in which of several they take (RFC 7468 section 2)."""
    match = _PEM.fullmatch(pem)
    try:
        return base64.b64decode(b"".join(match["body"].split()), validate=True) if match else None
    except binascii.Error:
        return None


def _content_faults(csr: x509.CertificateSigningRequest, request: SigningRequest) -> list[Fault]:
    try:
        faults = [_subject_fault(attribute, request) for attribute in csr.subject]
        faults += [_extension_fault(extension) for extension in csr.extensions]
    except UNREADABLE:
        return [Fault("spec.request", "has a subject or extensions that cannot be read")]
    return [fault for fault in faults if fault is not None]


def _subject_fault(attribute: x509.NameAttribute[str | bytes], request: SigningRequest) -> Fault | None:
    """A certificate has no subject but its first DNS name; scripts of old write that as CN."""
    field, value = f"subject {attribute.rfc4514_attribute_name}", str(attribute.value)
    if value.lower().startswith(_SYSTEM):
        return Fault(field, f"{value[:100]!r} is a name of Kubernetes' own")
    if attribute.oid != NameOID.COMMON_NAME:
        return Fault(field, "no certificate of this signer has that", "leave it away")
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
        return Fault(field, f"asks for more than {DIGITAL_SIGNATURE} and {KEY_ENCIPHERMENT}") if wrong else None
    if isinstance(value, x509.ExtendedKeyUsage):
        wrong = not set(value) <= _PURPOSE_OIDS
        return Fault(field, f"asks for more than {' and '.join(_USAGES)}") if wrong else None
    return Fault(f"extension {extension.oid.dotted_string}", "no certificate of this signer has that", "leave it away")
