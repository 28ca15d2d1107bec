"""A NodePublishVolume call as a value: protobuf and ``dict[str, str]`` end here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.core.attributes import parse_group_id
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import unverified_identity
from csi_driver.core.secret import Secret
from csi_driver.node.pods import Pod, PodToken

# kubelet's own keys in volume_context (KEP-596, KEP-1855, KEP-5538); it writes them over the pod's attributes.
_PREFIX = "csi.storage.k8s.io/"
_POD_NAME, _POD_NAMESPACE, _POD_UID = f"{_PREFIX}pod.name", f"{_PREFIX}pod.namespace", f"{_PREFIX}pod.uid"
_SERVICE_ACCOUNT, _EPHEMERAL = f"{_PREFIX}serviceAccount.name", f"{_PREFIX}ephemeral"
_TOKENS = f"{_PREFIX}serviceAccount.tokens"
_KUBELET_KEYS = frozenset({_POD_NAME, _POD_NAMESPACE, _POD_UID, _SERVICE_ACCOUNT, _EPHEMERAL, _TOKENS})
_MAX_TOKENS_LENGTH = 256 * 1024
_MAX_ID_LENGTH = 256
_MAX_PATH_LENGTH = 1024
"""Events, where the kubelet shows our words, hold no more."""


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """What kubelet asks for when it sets up, or looks after, one volume of a pod."""

    volume_id: str
    target: str
    pod: Pod
    attributes: Mapping[str, str]
    """The user's own, unread."""
    token: PodToken | None
    mount_group: int | None


def parse_publish(request: csi_pb2.NodePublishVolumeRequest) -> PublishRequest:
    """Reads a call; the token is taken from ``secrets``, else from ``volume_context``.

    Raises:
        CertmountError: InvalidRequest with every fault, or TokenRejected for a token that is not this pod's.
    """
    context = request.volume_context
    capability = request.volume_capability
    group = capability.mount.volume_mount_group
    faults = [*_shape_faults(request), *_context_faults(context)]
    if group:
        try:
            parse_group_id(group)
        except ValueError as problem:
            faults.append(Fault("pod.spec.securityContext.fsGroup", f"{group[:40]!a} {problem}"))
    if faults:
        raise CertmountError(Reason.INVALID_REQUEST, *faults)
    pod = Pod(context[_POD_NAMESPACE], context[_POD_NAME], context[_POD_UID], context[_SERVICE_ACCOUNT])
    return PublishRequest(
        volume_id=request.volume_id,
        target=request.target_path,
        pod=pod,
        attributes={key: value for key, value in context.items() if key not in _KUBELET_KEYS},
        token=_own_token(request.secrets.get(_TOKENS) or context.get(_TOKENS) or "", pod),
        mount_group=int(group) if group else None,
    )


def _shape_faults(request: csi_pb2.NodePublishVolumeRequest) -> list[Fault]:
    faults = []
    if not request.volume_id or len(request.volume_id) > _MAX_ID_LENGTH:
        faults.append(Fault("volume_id", f"is empty or longer than {_MAX_ID_LENGTH} characters"))
    if not request.target_path or len(request.target_path) > _MAX_PATH_LENGTH:
        faults.append(Fault("target_path", f"is empty or longer than {_MAX_PATH_LENGTH} characters"))
    if not request.HasField("volume_capability"):
        faults.append(Fault("volume_capability", "is missing"))
    elif request.volume_capability.HasField("block"):
        faults.append(
            Fault("volume_capability", "asks for a block device", "a certificate volume is a folder; use volumeMounts")
        )
    return faults


def _context_faults(context: Mapping[str, str]) -> list[Fault]:
    hint = "the CSIDriver object csi.certmount.dev must say podInfoOnMount: true"
    faults = [
        Fault(f"volume_context {key}", "is missing", hint)
        for key in (_POD_NAME, _POD_NAMESPACE, _POD_UID, _SERVICE_ACCOUNT)
        if not context.get(key)
    ]
    if context.get(_EPHEMERAL) != "true":
        problem = "is not an inline volume of the pod"
        hint = "declare it as pod.spec.volumes[].csi, not by a PersistentVolume"
        faults.append(Fault("pod.spec.volumes[]", problem, hint))
    forged = sorted(key for key in context if key.startswith(_PREFIX) and key not in _KUBELET_KEYS)
    return faults + [
        Fault(f"volumeAttributes.{ascii(key[:80])[1:-1]}", "is a name that only kubelet may use") for key in forged
    ]


def check_read_only(read_only: bool) -> None:
    """Raises CertmountError InvalidRequest for a volume that the pod could write to."""
    if not read_only:
        hint = "add readOnly: true beside driver: csi.certmount.dev"
        raise CertmountError(Reason.INVALID_REQUEST, Fault("pod.spec.volumes[].csi.readOnly", "must be true", hint))


def _own_token(tokens: str, pod: Pod) -> PodToken | None:
    """The token for our audience; None where kubelet sent none (it never does for a driver without tokenRequests)."""
    if not tokens:
        return None
    try:
        text = json.loads(tokens[:_MAX_TOKENS_LENGTH])[POD_AUDIENCE]["token"]
    except (ValueError, KeyError, TypeError, RecursionError):
        hint = f"the CSIDriver object must ask for tokenRequests with audience {POD_AUDIENCE}"
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", "is not in what kubelet sent", hint)) from None
    if not isinstance(text, str) or not text:
        return None
    if not text.isascii():
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", "is not a JSON Web Token"))
    token = PodToken(Secret(text), unverified_identity(Secret(text)))
    claimed = token.claims
    if (claimed.service_account.namespace, claimed.pod_name, claimed.pod_uid, claimed.service_account.name) != (
        pod.namespace,
        pod.name,
        pod.uid,
        pod.service_account,
    ):
        # kubelet's keys win over the pod's own attributes, but where kubelet sends no token a forged one gets through.
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", f"is {claimed}'s, not pod {pod}'s"))
    return token
