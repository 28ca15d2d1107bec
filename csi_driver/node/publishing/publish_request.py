"""Parse a NodePublishVolume call: protobuf and ``dict[str, str]`` end here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.core.attributes import CertificateSpec, parse_attributes, parse_group_id
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import unverified_identity
from csi_driver.core.secret import Secret
from csi_driver.host.target_paths import check_target
from csi_driver.node.pods import Pod, PodToken

P = ParamSpec("P")
T = TypeVar("T")

# The kubelet's own keys in volume_context (KEP-596, KEP-1855, KEP-5538). They override the pod's attributes.
_PREFIX = "csi.storage.k8s.io/"
_POD_NAME, _POD_NAMESPACE, _POD_UID = f"{_PREFIX}pod.name", f"{_PREFIX}pod.namespace", f"{_PREFIX}pod.uid"
_SERVICE_ACCOUNT, _EPHEMERAL = f"{_PREFIX}serviceAccount.name", f"{_PREFIX}ephemeral"
_TOKENS = f"{_PREFIX}serviceAccount.tokens"
_KUBELET_KEYS = frozenset({_POD_NAME, _POD_NAMESPACE, _POD_UID, _SERVICE_ACCOUNT, _EPHEMERAL, _TOKENS})
_MAX_TOKENS_LENGTH = 256 * 1024
_MAX_ID_LENGTH = 256
_MAX_PATH_LENGTH = 1024  # the maximum length of an event message, where the kubelet shows our errors


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """A NodePublishVolume call. ``attributes`` are the pod author's volume attributes, not parsed."""

    volume_id: str
    target: str
    pod: Pod
    attributes: Mapping[str, str]
    token: PodToken | None
    mount_group: int | None


def parse_publish(call: csi_pb2.NodePublishVolumeRequest, kubelet_dir: Path) -> PublishRequest:
    """Parse a call. The token comes from ``secrets``, or else from ``volume_context``.

    Attributes and target path are parsed only if something else is invalid, to report all faults together: a republish
    does not need them, see :func:`parse_declaration`.

    Raises CertmountError: InvalidRequest with all faults, or TokenRejected if the token belongs to another pod.
    """
    context = call.volume_context
    pod = Pod(*(context.get(key, "") for key in (_POD_NAMESPACE, _POD_NAME, _POD_UID, _SERVICE_ACCOUNT)))
    attributes = {key: value for key, value in context.items() if key not in _KUBELET_KEYS}
    group = call.volume_capability.mount.volume_mount_group
    if faults := [*_call_faults(call), *_context_faults(context), *_group_faults(group)]:
        errors = [CertmountError(Reason.INVALID_REQUEST, *faults)]
        own_attributes = {key: value for key, value in attributes.items() if not key.startswith(_PREFIX)}
        _collect(errors, parse_attributes, own_attributes)
        if pod.uid and 0 < len(call.target_path) <= _MAX_PATH_LENGTH:
            _collect(errors, check_target, kubelet_dir, call.target_path, pod.uid)
        raise _combine(errors)
    return PublishRequest(
        volume_id=call.volume_id,
        target=call.target_path,
        pod=pod,
        attributes=attributes,
        token=_pod_token(call.secrets.get(_TOKENS) or context.get(_TOKENS) or "", pod),
        mount_group=int(group) if group else None,
    )


def parse_declaration(request: PublishRequest, kubelet_dir: Path) -> tuple[CertificateSpec, Path]:
    """Parse the volume attributes and check the target path.

    Raises CertmountError: InvalidAttributes, or as :func:`check_target`, or InvalidRequest with the faults of both.
    """
    errors: list[CertmountError] = []
    spec = _collect(errors, parse_attributes, request.attributes)
    target = _collect(errors, check_target, kubelet_dir, request.target, request.pod.uid)
    if spec is None or target is None:
        raise _combine(errors)
    return spec, target


def _collect(errors: list[CertmountError], parse: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    try:
        return parse(*args, **kwargs)
    except CertmountError as error:
        errors.append(error)
        return None


def _combine(errors: Sequence[CertmountError]) -> CertmountError:
    """Return an only error unchanged; report several as one InvalidRequest with all faults."""
    if len(errors) == 1:
        return errors[0]
    return CertmountError(Reason.INVALID_REQUEST, *(fault for error in errors for fault in error.faults))


def _call_faults(call: csi_pb2.NodePublishVolumeRequest) -> list[Fault]:
    faults = []
    if not call.volume_id or len(call.volume_id) > _MAX_ID_LENGTH:
        faults.append(Fault("volume_id", f"is empty or longer than {_MAX_ID_LENGTH} characters"))
    if not call.target_path or len(call.target_path) > _MAX_PATH_LENGTH:
        faults.append(Fault("target_path", f"is empty or longer than {_MAX_PATH_LENGTH} characters"))
    if not call.HasField("volume_capability"):
        faults.append(Fault("volume_capability", "is missing"))
    elif call.volume_capability.HasField("block"):
        problem = "requests a block device, but a certificate volume is a directory"
        faults.append(Fault("volume_capability", problem, "use volumeMounts"))
    if not call.readonly:
        hint = "add readOnly: true next to driver: csi.certmount.dev"
        faults.append(Fault("pod.spec.volumes[].csi.readOnly", "must be true", hint))
    return faults


def _context_faults(context: Mapping[str, str]) -> list[Fault]:
    hint = "set podInfoOnMount: true in the CSIDriver object csi.certmount.dev"
    faults = [
        Fault(f"volume_context {key}", "is missing", hint)
        for key in (_POD_NAME, _POD_NAMESPACE, _POD_UID, _SERVICE_ACCOUNT)
        if not context.get(key)
    ]
    if context.get(_EPHEMERAL) != "true":
        hint = "declare it in pod.spec.volumes[].csi, not with a PersistentVolume"
        faults.append(Fault("pod.spec.volumes[]", "is not an inline volume of the pod", hint))
    reserved = sorted(key for key in context if key.startswith(_PREFIX) and key not in _KUBELET_KEYS)
    return faults + [
        Fault(f"volumeAttributes.{ascii(key[:80])[1:-1]}", "is reserved for the kubelet", "remove it")
        for key in reserved
    ]


def _group_faults(group: str) -> list[Fault]:
    try:
        parse_group_id(group or "0")
    except ValueError as problem:
        return [Fault("pod.spec.securityContext.fsGroup", f"{group[:40]!a} {problem}")]
    return []


def _pod_token(tokens: str, pod: Pod) -> PodToken | None:
    if not tokens:
        return None
    try:
        text = json.loads(tokens[:_MAX_TOKENS_LENGTH])[POD_AUDIENCE]["token"]
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = f"the kubelet sent no token with audience {POD_AUDIENCE}"
        hint = f"set tokenRequests with audience {POD_AUDIENCE} in the CSIDriver object"
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", problem, hint)) from None
    if not isinstance(text, str) or not text:
        return None
    if not text.isascii():
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", "is not a JSON Web Token"))
    token = PodToken(Secret(text), unverified_identity(Secret(text)))
    account, claims = token.claims.service_account, token.claims
    if Pod(account.namespace, claims.pod_name, claims.pod_uid, account.name) != pod:
        # The kubelet overrides a token key among the pod's attributes only if it sends a token itself.
        raise CertmountError(Reason.TOKEN_REJECTED, Fault("pod token", f"belongs to {claims}, not pod {pod}"))
    return token
