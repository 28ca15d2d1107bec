"""Parse a PodCertificateRequest: the key, and the annotations, which are attributes of the same table as a volume's."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

from cryptography.hazmat.primitives.serialization import load_der_public_key

from csi_driver.core.attribute_hints import hint_for
from csi_driver.core.attributes import ATTRIBUTES, CertificateSpec, IssuanceOptions, parse_attributes
from csi_driver.core.certificates.csr import ParsedCSR, content_faults, parse_csr
from csi_driver.core.certificates.der_bounds import NotDER, OutOfBounds, UnsupportedKeyType, csr_key_type
from csi_driver.core.certificates.keys import PublicKey, key_type_of
from csi_driver.core.certificates.parsing import PARSE_ERRORS
from csi_driver.core.cluster.pod_certificates import MIN_LIFETIME, PodCertificateRequest
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Fault, Reason, first_faults
from csi_driver.core.names import Names
from csi_driver.core.policy.decision import RequestFields
from csi_driver.core.spec import KeyType
from csi_driver.core.texts import quoted
from csi_driver.core.variables import pod_variables

PREFIX = "certmount.dev/"
_FIELD = "userAnnotations."
_VOLUME_FIELD = "volumeAttributes."
_STUB = "stubPKCS10Request"
_API_KEY_TYPES = {
    "EC-P256": "ECDSAP256",
    "EC-P384": "ECDSAP384",
    "EC-P521": "ECDSAP521",
    "Ed25519": "ED25519",
    "RSA-3072": "RSA3072",
    "RSA-4096": "RSA4096",
}
_KEY_TYPES = ", ".join(_API_KEY_TYPES[kind.value] for kind in KeyType if kind.value in _API_KEY_TYPES)
_MAX_FAULTS = 20
FIELDS = RequestFields(
    Reason.INVALID_ATTRIBUTES, f"{_FIELD}{PREFIX}", (("key-type", "keyType"), ("issuer", "signerName"))
)
"""Where a pod declares each attribute."""
LIFETIME = "maxExpirationSeconds"
LIFETIME_FIELDS = dataclasses.replace(FIELDS, names=(*FIELDS.names, ("duration", LIFETIME)))
"""The same for a request whose lifetime follows from the API's limits."""
_OPTIONS = {field.name for field in dataclasses.fields(IssuanceOptions)} - {"issuer", "federations"}
_NAMES = {field.name for field in dataclasses.fields(Names)}
ANNOTATIONS = tuple(row.name for row in ATTRIBUTES if row.field in {*_OPTIONS, *_NAMES, "renew_before"})
"""The attributes of a volume that are also annotations."""
_ELSEWHERE = {
    "key-type": "set keyType in the projection",
    "issuer": "set signerName in the projection",
    "federations": "add a clusterTrustBundle source to the volume",
}
_FILES = "Kubernetes writes the files of this volume; use the fields of the projection, or a CSI volume"


class UnsupportedKey(CertmountError):
    """The signer does not support the type of the key."""

    def __init__(self, problem: str) -> None:
        fault = Fault("keyType", problem, f"use one of {_KEY_TYPES}")
        super().__init__(Reason.INVALID_CSR, fault)


def parse_annotations(request: PodCertificateRequest) -> CertificateSpec:
    """Return what the pod requests in addition to its SPIFFE ID; raises CertmountError InvalidAttributes with all faults."""
    if request.annotations is None:
        raise _invalid(Fault("userAnnotations", "are too large", "use at most 64 annotations and 64 KiB"))
    faults = [fault for key in sorted(request.annotations) if (fault := _key_fault(key))]
    if faults:
        raise _invalid(*faults)
    attributes = {key.removeprefix(PREFIX): value for key, value in request.annotations.items()}
    variables = pod_variables(
        namespace=request.namespace,
        name=request.pod_name,
        uid=request.pod_uid,
        service_account=request.service_account,
        node=request.node_name,
    )
    try:
        spec = parse_attributes(attributes, variables)
    except CertmountError as error:
        raise CertmountError(error.reason, *(_renamed(fault) for fault in error.faults)) from None
    if fault := _duration_fault(spec.duration, request.max_lifetime):
        raise _invalid(fault)
    return spec


def parse_key(request: PodCertificateRequest) -> ParsedCSR:
    """Return the verified key; raises UnsupportedKey, or CertmountError InvalidCSR for a CSR that contains more than a key."""
    if not request.csr:
        return _bare_key(request.public_key)
    try:
        csr_key_type(request.csr)
    except UnsupportedKeyType:
        raise UnsupportedKey("the signer does not support this type") from None
    except (NotDER, OutOfBounds):
        pass  # the parser has the words
    csr = parse_csr(request.csr)
    if len(csr.names) or content_faults(csr):
        hint = f"the kubelet creates an empty one; use userAnnotations, such as {PREFIX}dns-names"
        raise CertmountError(Reason.INVALID_CSR, Fault(_STUB, "contains more than a key", hint))
    return csr


def _bare_key(der: bytes) -> ParsedCSR:
    """Return a key without a CSR, as the kubelet 1.35 sends it. The API server has verified its type and possession."""
    try:
        key = load_der_public_key(der)
    except PARSE_ERRORS:
        raise CertmountError(Reason.INVALID_CSR, Fault("pkixPublicKey", "is not a public key in DER")) from None
    key_type = key_type_of(key)
    if key_type is None or not isinstance(key, PublicKey):
        raise UnsupportedKey("the signer does not support this type")
    return ParsedCSR(b"", key, key_type, Names())


def _key_fault(key: str) -> Fault | None:
    name = key.removeprefix(PREFIX)
    if key.startswith(PREFIX) and name in ANNOTATIONS:
        return None
    shown = quoted(key)[1:-1]
    if key.startswith(PREFIX) and any(row.name == name for row in ATTRIBUTES):
        return Fault(f"{_FIELD}{shown}", "is for CSI volumes only", _ELSEWHERE.get(name, _FILES))
    known = f"known annotations: {', '.join(PREFIX + one for one in ANNOTATIONS)}"
    hint = (hint_for(name, ANNOTATIONS) or known).replace("did you mean ", f"did you mean {PREFIX}")
    return Fault(f"{_FIELD}{shown}", "is unknown", hint)


def _duration_fault(duration: timedelta | None, longest: timedelta) -> Fault | None:
    if duration is None or MIN_LIFETIME <= duration <= longest:
        return None
    field, limit, shown = f"{_FIELD}{PREFIX}duration", format_duration(longest), format_duration(duration)
    if duration > longest:
        hint = f"use at most {limit}, or set maxExpirationSeconds"
        return Fault(field, f"{shown} is longer than the {limit} of maxExpirationSeconds", hint)
    hint = f"use at least {format_duration(MIN_LIFETIME)}, or a CSI volume"
    return Fault(field, f"{shown} is shorter than Kubernetes allows for pod certificates", hint)


def _renamed(fault: Fault | str) -> Fault | str:
    """Return the fault with the field that the pod declares."""
    if isinstance(fault, str) or not fault.field.startswith(_VOLUME_FIELD):
        return fault
    return dataclasses.replace(fault, field=f"{_FIELD}{PREFIX}{fault.field.removeprefix(_VOLUME_FIELD)}")


def _invalid(*faults: Fault) -> CertmountError:
    return CertmountError(Reason.INVALID_ATTRIBUTES, *first_faults(faults, _MAX_FAULTS))
