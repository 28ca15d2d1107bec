"""Verify what a CertificateSigningRequest contains, and the pod that created it, which the API server recorded.

What the certificate cannot contain is rejected, not omitted.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.authority.authn.token_verifier import token_rejected
from csi_driver.core.certificates.csr import MAX_CSR_BYTES, ParsedCSR, parse_csr
from csi_driver.core.certificates.csr_content import content_faults
from csi_driver.core.cluster.csr import DIGITAL_SIGNATURE, KEY_ENCIPHERMENT, PURPOSES, ClusterCSR
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import InvalidName, parse_object_name
from csi_driver.core.policy.engine import RequestedCertificate
from csi_driver.core.spec import Usage

_PEM = re.compile(
    # The body starts with a character other than white space: otherwise a long run of it causes quadratic backtracking.
    rb"\s*-----BEGIN CERTIFICATE REQUEST-----\s*(?P<body>[A-Za-z0-9+/][A-Za-z0-9+/=\s]*)-----END CERTIFICATE REQUEST-----\s*"
)
_MAX_PEM_BYTES = 2 * MAX_CSR_BYTES
_USAGES = {word: usage for usage, word in PURPOSES.items()}
_ALLOWED_USAGES = {*_USAGES, DIGITAL_SIGNATURE, KEY_ENCIPHERMENT}
_ACCOUNT = "system:serviceaccount:"
_EXTRA = "authentication.kubernetes.io/"
_HINT = "use a token that is bound to the pod, such as the one that Kubernetes mounts into it"


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
    return CSRContent(csr, usages, None if request.expiration_s is None else timedelta(seconds=request.expiration_s))


def _decode_only_block(pem: bytes) -> bytes | None:
    """Return the DER of the only PEM block. Parsers disagree about which of several blocks counts (RFC 7468 section 2)."""
    match = _PEM.fullmatch(pem) if len(pem) <= _MAX_PEM_BYTES else None
    try:
        return base64.b64decode(b"".join(match["body"].split()), validate=True) if match else None
    except binascii.Error:
        return None


def parse_requester(csr: ClusterCSR) -> PodIdentity:
    """Return the pod whose token created the request (KEP-4193: Kubernetes 1.30 and later record it).

    Raises CertmountError TokenRejected for a user, a node, or a token that is not bound to a pod.
    """
    namespace, _, name = csr.username.removeprefix(_ACCOUNT).partition(":")
    try:
        account = ServiceAccount(parse_object_name(namespace), parse_object_name(name))
    except InvalidName:
        account = None
    if account is None or account.username != csr.username:
        raise token_rejected("requester", f"{csr.username!r} is not a service account", _HINT)
    recorded = {key: csr.extra.get(_EXTRA + key, ()) for key in ("pod-name", "pod-uid", "node-name")}
    if missing := [key for key, values in recorded.items() if len(values) != 1 or not values[0]]:
        raise token_rejected("requester", f"the token of {csr.username} has no {', '.join(missing)}", _HINT)
    (pod_name,), (pod_uid,), (node_name,) = recorded.values()
    node_uid = (*csr.extra.get(f"{_EXTRA}node-uid", ()), "")[0]
    # The token's expiry is unknown. The API server accepted the token just now, and the pod is verified to be running.
    return PodIdentity(account, "", pod_name, pod_uid, node_name, node_uid, 0.0)


def verify_running(pod: PodIdentity, found: LivePod | None) -> None:
    """Raise CertmountError TokenRejected unless the cluster has this pod, on this node, and it is not terminating."""
    if found is None or found.uid != pod.pod_uid:
        problem = "does not exist" if found is None else "was created again; the token belongs to the previous pod"
        raise token_rejected(str(pod), problem)
    problems = []
    if found.service_account != pod.service_account.name:
        problems.append(f"runs as service account {found.service_account}, not {pod.service_account.name}")
    if found.node_name != pod.node_name:
        problems.append(f"is on node {found.node_name or '(none)'}, but its token names {pod.node_name}")
    if found.terminating:
        problems.append("is terminating")
    if problems:
        raise CertmountError(Reason.TOKEN_REJECTED, *(Fault(str(pod), problem) for problem in problems))
