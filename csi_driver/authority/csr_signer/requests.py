"""Verify the content of a CertificateSigningRequest, and the pod that created it, which the API server recorded."""

from __future__ import annotations

import base64
import binascii
import re
from datetime import timedelta

from csi_driver.authority.authn.token_verifier import token_rejected
from csi_driver.core.certificates.csr import MAX_CSR_BYTES, ParsedCSR, content_faults, parse_csr
from csi_driver.core.cluster.csr import DIGITAL_SIGNATURE, KEY_ENCIPHERMENT, PURPOSES, ClusterCSR
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import SERVICE_ACCOUNT_USER, TOKEN_FIELD, PodIdentity, ServiceAccount
from csi_driver.core.names import InvalidName, parse_object_name
from csi_driver.core.policy.decision import RequestFields
from csi_driver.core.policy.engine import RequestedCertificate

_PEM = re.compile(
    # The body starts with a character other than white space: otherwise a long run of it causes quadratic backtracking.
    rb"\s*-----BEGIN CERTIFICATE REQUEST-----\s*(?P<body>[A-Za-z0-9+/][A-Za-z0-9+/=\s]*)-----END CERTIFICATE REQUEST-----\s*"
)
_MAX_PEM_BYTES = 2 * MAX_CSR_BYTES
_USAGES = {word: usage for usage, word in PURPOSES.items()}
_ALLOWED_USAGES = {*_USAGES, DIGITAL_SIGNATURE, KEY_ENCIPHERMENT}
_FIELDS = RequestFields(
    Reason.INVALID_CSR,
    "spec.request, ",
    (("duration", "spec.expirationSeconds"), ("usages", "spec.usages"), ("issuer", "spec.signerName")),
)
_HINT = "use a token that is bound to the pod, such as the one that Kubernetes mounts into it"


def parse_content(request: ClusterCSR) -> tuple[ParsedCSR, RequestedCertificate]:
    """Return the CSR and the requested certificate of the internal CA; raises CertmountError InvalidCSR with all faults."""
    faults: list[Fault] = []  # what the certificate cannot contain is rejected, not omitted
    if unknown := ", ".join(usage for usage in request.usages if usage not in _ALLOWED_USAGES):
        hint = f"use {', '.join(sorted(_ALLOWED_USAGES))}"
        faults.append(Fault("spec.usages", f"{unknown} is not allowed for pods", hint))
    usages = tuple(usage for word, usage in _USAGES.items() if word in request.usages)
    if not usages:
        faults.append(Fault("spec.usages", "contains neither server auth nor client auth"))
    der = _decode_only_block(request.request)
    if der is None:
        fault = Fault("spec.request", "is not exactly one PEM block CERTIFICATE REQUEST")
        raise CertmountError(Reason.INVALID_CSR, *faults, fault)
    try:
        csr = parse_csr(der)
    except CertmountError as error:
        raise CertmountError(Reason.INVALID_CSR, *faults, *error.faults) from None
    if faults := [*faults, *content_faults(csr)]:
        raise CertmountError(Reason.INVALID_CSR, *faults)
    duration = None if request.expiration_s is None else timedelta(seconds=request.expiration_s)
    return csr, RequestedCertificate(csr.names, csr.key_type, _FIELDS, usages=usages, duration=duration)


def _decode_only_block(pem: bytes) -> bytes | None:
    """Return the DER of the only PEM block. Parsers disagree about which of several blocks counts (RFC 7468 section 2)."""
    match = _PEM.fullmatch(pem) if len(pem) <= _MAX_PEM_BYTES else None
    try:
        return base64.b64decode(b"".join(match["body"].split()), validate=True) if match else None
    except binascii.Error:
        return None


def parse_requester(csr: ClusterCSR) -> PodIdentity:
    """Return the pod whose token created the request, which Kubernetes records (KEP-4193); raises CertmountError TokenRejected."""
    namespace, _, name = csr.username.removeprefix(SERVICE_ACCOUNT_USER).partition(":")
    try:
        account = ServiceAccount(parse_object_name(namespace), parse_object_name(name))
    except InvalidName:
        account = None
    if account is None or account.username != csr.username:
        raise token_rejected("requester", f"{csr.username!r} is not a service account", _HINT)
    recorded = {key: csr.extra.get(TOKEN_FIELD + key, ()) for key in ("pod-name", "pod-uid", "node-name")}
    if missing := [key for key, values in recorded.items() if len(values) != 1 or not values[0]]:
        raise token_rejected("requester", f"the token of {csr.username} has no {', '.join(missing)}", _HINT)
    (pod_name,), (pod_uid,), (node_name,) = recorded.values()
    node_uid = (*csr.extra.get(f"{TOKEN_FIELD}node-uid", ()), "")[0]
    # The token's expiry is unknown. The API server accepted the token just now, and the pod is verified to be running.
    return PodIdentity(account, "", pod_name, pod_uid, node_name, node_uid, 0.0)


def verify_running(pod: PodIdentity, found: LivePod | None) -> None:
    """Raise CertmountError TokenRejected unless the cluster has this pod, on this node, and it is not terminating."""
    if found is None or found.uid != pod.pod_uid:
        problem = "does not exist" if found is None else "was created again; the token belongs to the previous pod"
        raise token_rejected(str(pod), problem)
    account, node = found.service_account, found.node_name
    problems = {
        f"runs as service account {account}, not {pod.service_account.name}": account != pod.service_account.name,
        f"is on node {node or '(none)'}, but its token names {pod.node_name}": node != pod.node_name,
        "is terminating": found.terminating,
    }
    if faults := [Fault(str(pod), problem) for problem, present in problems.items() if present]:
        raise CertmountError(Reason.TOKEN_REJECTED, *faults)
