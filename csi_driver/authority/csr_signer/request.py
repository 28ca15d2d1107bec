"""What a request asks for, read with care: what would not come out in the certificate is refused, never left out in silence."""

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
    # No white space can be matched in two ways: a long run of it would take for ever to be refused.
    rb"\s*-----BEGIN CERTIFICATE REQUEST-----\s*(?P<body>[A-Za-z0-9+/][A-Za-z0-9+/=\s]*)-----END CERTIFICATE REQUEST-----\s*"
)
_MAX_PEM_BYTES = 2 * MAX_CSR_BYTES
_USAGES = {word: usage for usage, word in PURPOSES.items()}
_HARMLESS = {*_USAGES, DIGITAL_SIGNATURE, KEY_ENCIPHERMENT}


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that is well formed, whoever has made it."""

    request: ParsedCSR
    usages: tuple[Usage, ...]
    duration: timedelta | None

    @property
    def asked(self) -> RequestedCertificate:
        """In the policy's words: the issuer is the internal CA, which this signer is a way to."""
        return RequestedCertificate(self.request.names, self.request.key_type, self.usages, self.duration)


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
    faults += content_faults(request)
    if faults:
        raise CertmountError(Reason.INVALID_CSR, *faults)
    return Wish(request, usages, None if csr.life_s is None else timedelta(seconds=csr.life_s))


def _only_block(pem: bytes) -> bytes | None:
    """The DER of the one PEM block there is; readers differ in which of several they take (RFC 7468 section 2)."""
    match = _PEM.fullmatch(pem) if len(pem) <= _MAX_PEM_BYTES else None
    try:
        return base64.b64decode(b"".join(match["body"].split()), validate=True) if match else None
    except binascii.Error:
        return None
