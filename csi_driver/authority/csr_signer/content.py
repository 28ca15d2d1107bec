"""Parse the content of a CertificateSigningRequest. What the certificate cannot contain is rejected, not omitted."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.certificates.csr import MAX_CSR_BYTES, ParsedCSR, parse_csr
from csi_driver.core.certificates.csr_content import content_faults
from csi_driver.core.cluster.csr import DIGITAL_SIGNATURE, KEY_ENCIPHERMENT, PURPOSES, ClusterCSR
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.policy.engine import RequestedCertificate
from csi_driver.core.spec import Usage

_PEM = re.compile(
    # The body starts with a character other than white space: otherwise a long run of it causes quadratic backtracking.
    rb"\s*-----BEGIN CERTIFICATE REQUEST-----\s*(?P<body>[A-Za-z0-9+/][A-Za-z0-9+/=\s]*)-----END CERTIFICATE REQUEST-----\s*"
)
_MAX_PEM_BYTES = 2 * MAX_CSR_BYTES
_USAGES = {word: usage for usage, word in PURPOSES.items()}
_ALLOWED_USAGES = {*_USAGES, DIGITAL_SIGNATURE, KEY_ENCIPHERMENT}


@dataclass(frozen=True, slots=True)
class CSRContent:
    """The content of a well-formed CertificateSigningRequest."""

    csr: ParsedCSR
    usages: tuple[Usage, ...]
    duration: timedelta | None

    @property
    def requested(self) -> RequestedCertificate:
        """The certificate for the policy. Its issuer is the internal CA, which signs for this signer."""
        return RequestedCertificate(self.csr.names, self.csr.key_type, self.usages, self.duration)


def parse_content(request: ClusterCSR) -> CSRContent:
    """Return the content of a request; raises CertmountError InvalidCSR with all faults."""
    faults: list[Fault] = []
    if unknown := [usage for usage in request.usages if usage not in _ALLOWED_USAGES]:
        hint = f"use {', '.join(sorted(_ALLOWED_USAGES))}"
        faults.append(Fault("spec.usages", f"{', '.join(unknown)} is not allowed for pods", hint))
    usages = tuple(usage for word, usage in _USAGES.items() if word in request.usages)
    if not usages:
        faults.append(Fault("spec.usages", "contains neither server auth nor client auth"))
    der = _decode_only_block(request.request)
    if der is None:
        problem = "is not exactly one PEM block CERTIFICATE REQUEST"
        raise CertmountError(Reason.INVALID_CSR, *faults, Fault("spec.request", problem))
    try:
        csr = parse_csr(der)
    except CertmountError as error:
        raise CertmountError(Reason.INVALID_CSR, *faults, *error.faults) from None
    faults += content_faults(csr)
    if faults:
        raise CertmountError(Reason.INVALID_CSR, *faults)
    return CSRContent(csr, usages, None if request.expiration_s is None else timedelta(seconds=request.expiration_s))


def _decode_only_block(pem: bytes) -> bytes | None:
    """Return the DER of the only PEM block. Parsers disagree about which of several blocks counts (RFC 7468 section 2)."""
    match = _PEM.fullmatch(pem) if len(pem) <= _MAX_PEM_BYTES else None
    try:
        return base64.b64decode(b"".join(match["body"].split()), validate=True) if match else None
    except binascii.Error:
        return None
