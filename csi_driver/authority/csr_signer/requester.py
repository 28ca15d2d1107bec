"""Who has made a request, as the API server has stamped it on: only a pod's own token counts, and only while the pod lives."""

from __future__ import annotations

from csi_driver.core.cluster.csr import ClusterCSR
from csi_driver.core.cluster.pod import LivePod
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import NameProblem, parse_object_name

_ACCOUNT = "system:serviceaccount:"
_EXTRA = "authentication.kubernetes.io/"
_HINT = "use a token that is bound to the pod, such as the one that Kubernetes mounts into it"


def requester_of(csr: ClusterCSR) -> PodIdentity:
    """The pod whose token made the request (KEP-4193: Kubernetes 1.30 and newer stamp all of it).

    Raises:
        CertmountError: TokenRejected for anyone else: a person, a node, a token that is bound to no pod.
    """
    namespace, colon, account = csr.username.removeprefix(_ACCOUNT).partition(":")
    if not csr.username.startswith(_ACCOUNT) or not colon or not (_is_name(namespace) and _is_name(account)):
        raise _refused("requester", f"{csr.username!r} is no service account", _HINT)
    stamped = {word: csr.extra.get(_EXTRA + word, ()) for word in ("pod-name", "pod-uid", "node-name")}
    if lacking := [word for word, values in stamped.items() if len(values) != 1 or not values[0]]:
        raise _refused("requester", f"{csr.username} came without {', '.join(lacking)}", _HINT)
    (pod_name,), (pod_uid,), (node_name,) = stamped.values()
    node_uid = (*csr.extra.get(f"{_EXTRA}node-uid", ()), "")[0]
    # The token's end is not known here: the API server has taken it a moment ago, and whether the pod lives is asked.
    return PodIdentity(ServiceAccount(namespace, account), "", pod_name, pod_uid, node_name, node_uid, 0.0)


def check_live(pod: PodIdentity, found: LivePod | None) -> None:
    """Raises CertmountError TokenRejected unless the cluster has this very pod, on that node, and not in its end."""
    if found is None or found.uid != pod.pod_uid:
        raise _refused(str(pod), "is gone" if found is None else "was made anew since; its token is of the one before")
    faults = []
    if found.service_account != pod.service_account.name:
        faults.append(f"runs as service account {found.service_account}, not {pod.service_account.name}")
    if found.node_name != pod.node_name:
        faults.append(f"is on node {found.node_name or '(none)'}, but its token names {pod.node_name}")
    if found.ending:
        faults.append("is ending")
    if faults:
        raise CertmountError(Reason.TOKEN_REJECTED, *(Fault(str(pod), fault) for fault in faults))


def _is_name(text: str) -> bool:
    try:
        parse_object_name(text)
    except NameProblem:
        return False
    return True


def _refused(field: str, problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.TOKEN_REJECTED, Fault(field, problem, hint))
