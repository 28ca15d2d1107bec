"""Parse a NodePublishVolume call: protobuf and ``dict[str, str]`` end here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.core.attributes import KEY_TYPE, ROOT_ONLY, CertificateSpec, parse_attributes, parse_group_id
from csi_driver.core.cert_manager import PREFIX as CERT_MANAGER
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.layout import FileLayout
from csi_driver.core.identity import unverified_identity
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_KEY_TYPE, KeyType
from csi_driver.host.target_paths import check_target
from csi_driver.node.pods import Pod, PodToken
from csi_driver.node.volumes.volume_files import FileAccess

P = ParamSpec("P")
T = TypeVar("T")

# The kubelet's own keys in volume_context (KEP-596, KEP-1855, KEP-5538). They override the pod's attributes.
_PREFIX = "csi.storage.k8s.io/"
_POD_NAME, _POD_NAMESPACE, _POD_UID = f"{_PREFIX}pod.name", f"{_PREFIX}pod.namespace", f"{_PREFIX}pod.uid"
_SERVICE_ACCOUNT, _EPHEMERAL = f"{_PREFIX}serviceAccount.name", f"{_PREFIX}ephemeral"
_TOKENS = f"{_PREFIX}serviceAccount.tokens"
_KUBELET_KEYS = frozenset({_POD_NAME, _POD_NAMESPACE, _POD_UID, _SERVICE_ACCOUNT, _EPHEMERAL, _TOKENS})
_MAX_TOKENS_LENGTH = 64 * 1024
_PASSWORD = "password"  # the key in the pod's Secret
_MAX_PASSWORD_LENGTH = 128
MAX_ATTRIBUTES = 64
MAX_ATTRIBUTES_BYTES = 64 * 1024
"""All names and values together. A pod's object can be 1.5 MiB long, and each volume keeps its attributes in its record."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""No valid value has them. Each needs six bytes of a record, which would be too long; others need at most three times theirs."""
_MAX_ID_LENGTH = 256
_MAX_PATH_LENGTH = 1024  # the maximum length of an event message, where the kubelet shows our errors


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """A NodePublishVolume call. ``attributes`` are the pod author's volume attributes, not parsed."""

    volume_id: str
    target: str
    pod: Pod
    attributes: Mapping[str, str]
    variables: Mapping[str, str]  # the values of the variables in the attributes
    token: PodToken | None
    mount_group: int | None
    secrets: Mapping[str, Secret[str]]
    """The Secret of nodePublishSecretRef, not parsed."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What the pod author declares: the files and their password (None: the driver generates one), and where they are."""

    spec: CertificateSpec
    target: Path
    password: Secret[bytes] | None


def calling_pod(call: csi_pb2.NodePublishVolumeRequest) -> Pod:
    """Return the pod of a call as the kubelet names it. Missing values are empty."""
    context = call.volume_context
    return Pod(*(context.get(key, "") for key in (_POD_NAMESPACE, _POD_NAME, _POD_UID, _SERVICE_ACCOUNT)))


def parse_publish(call: csi_pb2.NodePublishVolumeRequest, kubelet_dir: Path, node_name: str) -> PublishRequest:
    """Parse a call. The token comes from ``secrets``, or else from ``volume_context``.

    Attributes and target path are parsed only if something else is invalid, to report all faults together: a republish
    does not need them, see :func:`parse_declaration`.

    Raises CertmountError: InvalidRequest with all faults, or TokenRejected if the token belongs to another pod.
    """
    context, pod = call.volume_context, calling_pod(call)
    variables = pod.variables(node_name)
    attributes = {key: value for key, value in context.items() if key not in _KUBELET_KEYS}
    group = call.volume_capability.mount.volume_mount_group
    if fault := _size_fault(attributes):  # first: the other checks quote and compare attributes
        raise CertmountError(Reason.INVALID_REQUEST, fault)
    if faults := [*_call_faults(call), *_context_faults(context), *_group_faults(group)]:
        errors = [CertmountError(Reason.INVALID_REQUEST, *faults)]
        own_attributes = {key: value for key, value in attributes.items() if not key.startswith(_PREFIX)}
        _collect(errors, parse_attributes, own_attributes, variables)
        if pod.uid and 0 < len(call.target_path) <= _MAX_PATH_LENGTH:
            _collect(errors, check_target, kubelet_dir, call.target_path, pod.uid)
        raise _combine(errors)
    return PublishRequest(
        volume_id=call.volume_id,
        target=call.target_path,
        pod=pod,
        attributes=attributes,
        variables=variables,
        token=_pod_token(call.secrets.get(_TOKENS) or context.get(_TOKENS) or "", pod),
        mount_group=int(group) if group else None,
        secrets={key: Secret(value) for key, value in call.secrets.items() if key != _TOKENS},
    )


def with_key_type(request: PublishRequest, key_type: KeyType) -> PublishRequest:
    """Return the request with this key type unless the pod sets one.

    The volume's record contains it, so that a driver with another default does not change the key types of its volumes.
    Volumes for cert-manager's driver have the default of that driver, and volumes with only roots have no key.
    """
    if key_type is DEFAULT_KEY_TYPE or KEY_TYPE in request.attributes or request.attributes.get(ROOT_ONLY) == "true":
        return request
    if any(key.startswith(CERT_MANAGER) for key in request.attributes):
        return request
    return replace(request, attributes={**request.attributes, KEY_TYPE: key_type.value})


def parse_declaration(request: PublishRequest, kubelet_dir: Path) -> Declaration:
    """Parse the volume attributes and the password, and check the target path.

    Raises CertmountError: InvalidAttributes, or as :func:`check_target`, or InvalidRequest with the faults of all.
    """
    errors: list[CertmountError] = []
    spec = _collect(errors, parse_attributes, request.attributes, request.variables)
    target = _collect(errors, check_target, kubelet_dir, request.target, request.pod.uid)
    password = None
    if spec is not None:
        _collect(errors, _check_characters, request.attributes)
        password = _collect(errors, parse_password, request, spec.layout)
        _collect(errors, _check_access, spec, request.mount_group)
    if spec is None or target is None or errors:
        raise _combine(errors)
    return Declaration(spec, target, password)


def _check_characters(attributes: Mapping[str, str]) -> None:
    """Check attributes that are valid otherwise: the spaces around a value can be control characters."""
    if found := sorted(key for key in attributes if _CONTROL.search(key) or _CONTROL.search(attributes[key])):
        names = (f"volumeAttributes.{ascii(key[:80])[1:-1]}" for key in found)
        faults = (Fault(name, "has control characters", "remove them") for name in names)
        raise CertmountError(Reason.INVALID_ATTRIBUTES, *faults)


def _check_access(spec: CertificateSpec, mount_group: int | None) -> None:
    if spec.layout.strict and not FileAccess.of(spec, mount_group).is_strict:
        problem = "selects files for a program that rejects the owner and the mode of the key"
        hint = "set gid or the pod's fsGroup to a group of the program, or uid to its user, with key-mode 0400 or 0600"
        fault = Fault("volumeAttributes.files", problem, hint)
        raise CertmountError(Reason.INVALID_ATTRIBUTES, fault)


def parse_password(request: PublishRequest, layout: FileLayout) -> Secret[bytes] | None:
    """Return the password of the pod's Secret, or None if the pod has no Secret; raises CertmountError InvalidRequest."""
    if not request.secrets:
        return None
    if not layout.has_stores:
        hint = "remove it, or add a file with a password, for example with files: java"
        raise _secret_error("is set, but no file of the volume has a password", hint)
    if _PASSWORD not in request.secrets:
        raise _secret_error(f"names a Secret without the key {_PASSWORD}", "add this key to the Secret")
    password = request.secrets[_PASSWORD].reveal()
    if not (password.isascii() and password.isprintable() and 0 < len(password) <= _MAX_PASSWORD_LENGTH):
        problem = f"names a Secret whose {_PASSWORD} is not 1 to {_MAX_PASSWORD_LENGTH} printable ASCII characters"
        raise _secret_error(problem, "remove other characters, for example a newline at the end")
    return Secret(password.encode())


def _secret_error(problem: str, hint: str) -> CertmountError:
    fault = Fault("pod.spec.volumes[].csi.nodePublishSecretRef", problem, hint)
    return CertmountError(Reason.INVALID_REQUEST, fault)


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


def _size_fault(attributes: Mapping[str, str]) -> Fault | None:
    if len(attributes) > MAX_ATTRIBUTES:
        return Fault("volumeAttributes", f"has {len(attributes)} attributes", f"use at most {MAX_ATTRIBUTES}")
    size = sum(len(key.encode()) + len(value.encode()) for key, value in attributes.items())
    if size > MAX_ATTRIBUTES_BYTES:
        return Fault("volumeAttributes", f"has {size} bytes", f"use at most {MAX_ATTRIBUTES_BYTES}")
    return None


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
