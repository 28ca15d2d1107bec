"""Authenticate the pod that created a CertificateSigningRequest, from what the API server recorded about its token."""

from __future__ import annotations

from csi_driver.core.cluster.csr import ClusterCSR
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import InvalidName, parse_object_name

_ACCOUNT = "system:serviceaccount:"
_EXTRA = "authentication.kubernetes.io/"
_HINT = "use a token that is bound to the pod, such as the one that Kubernetes mounts into it"


def parse_requester(csr: ClusterCSR) -> PodIdentity:
    """Return the pod whose token created the request (KEP-4193: Kubernetes 1.30 and later record it).

    Raises:
        CertmountError: TokenRejected for a user, a node, or a token that is not bound to a pod.
    """
    namespace, colon, account = csr.username.removeprefix(_ACCOUNT).partition(":")
    if not csr.username.startswith(_ACCOUNT) or not colon or not (_is_name(namespace) and _is_name(account)):
        raise _rejected("requester", f"{csr.username!r} is not a service account", _HINT)
    recorded = {key: csr.extra.get(_EXTRA + key, ()) for key in ("pod-name", "pod-uid", "node-name")}
    if missing := [key for key, values in recorded.items() if len(values) != 1 or not values[0]]:
        raise _rejected("requester", f"the token of {csr.username} has no {', '.join(missing)}", _HINT)
    (pod_name,), (pod_uid,), (node_name,) = recorded.values()
    node_uid = (*csr.extra.get(f"{_EXTRA}node-uid", ()), "")[0]
    # The token's expiry is unknown. The API server accepted the token just now, and the pod is verified to be running.
    return PodIdentity(ServiceAccount(namespace, account), "", pod_name, pod_uid, node_name, node_uid, 0.0)


def verify_running(pod: PodIdentity, found: LivePod | None) -> None:
    """Raise CertmountError TokenRejected unless the cluster has this pod, on this node, and it is not terminating."""
    if found is None or found.uid != pod.pod_uid:
        problem = "does not exist" if found is None else "was created again; the token belongs to the previous pod"
        raise _rejected(str(pod), problem)
    problems = []
    if found.service_account != pod.service_account.name:
        problems.append(f"runs as service account {found.service_account}, not {pod.service_account.name}")
    if found.node_name != pod.node_name:
        problems.append(f"is on node {found.node_name or '(none)'}, but its token names {pod.node_name}")
    if found.terminating:
        problems.append("is terminating")
    if problems:
        raise CertmountError(Reason.TOKEN_REJECTED, *(Fault(str(pod), problem) for problem in problems))


def _is_name(text: str) -> bool:
    try:
        parse_object_name(text)
    except InvalidName:
        return False
    return True


def _rejected(field: str, problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.TOKEN_REJECTED, Fault(field, problem, hint))
