"""Invalid publish calls and the expected errors."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2
from tests.integration.node.world import Failure, Node, Request, failure_of
from tests.support.kubelet import FakePod

TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
INVALID, DENIED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
FAILED, UNAVAILABLE = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE


ATTRIBUTES: list[tuple[dict[str, str], tuple[str, ...]]] = [
    ({"dns-name": "a.example.com"}, ("volumeAttributes.dns-name: is unknown", "did you mean dns-names?")),
    ({"issuer": "x y", "bogus": "y"}, ("volumeAttributes.issuer", "volumeAttributes.bogus", "known attributes: name")),
    ({"name": ""}, ("volumeAttributes.name: is empty", "omit the attribute")),
    ({"name": "a" * 64 + ".example.com"}, ("volumeAttributes.name",)),
    ({"dns-names": "x" * 40_000}, ("volumeAttributes.dns-names: is 40000 characters long",)),
    ({"dns-names": ",".join(f"n{number}.example.com" for number in range(1000))}, ("1000 names", "at most 100")),
    ({"name": "*"}, ("volumeAttributes.name",)),
    ({"name": "a.*.example.com"}, ("volumeAttributes.name",)),
    ({"name": "bücher.example"}, ("volumeAttributes.name", "\\xfc")),
    ({"name": "a\nb\x1b[31m\0.example.com"}, ("volumeAttributes.name", "\\n", "\\x1b", "\\x00")),
    ({"na\nme": "x"}, ("volumeAttributes.na\\nme",)),
    ({"duration": "-5m"}, ("volumeAttributes.duration", "is negative")),
    ({"duration": "0s"}, ("volumeAttributes.duration", "use at least 10s")),
    ({"duration": "1 hour"}, ("volumeAttributes.duration", "such as 1h30m")),
    ({"duration": "1h", "renew-before": "2h"}, ("volumeAttributes.renew-before", "not shorter than")),
    ({"duration": "1h", "renew-before": "0s"}, ("volumeAttributes.renew-before", "is zero")),
    ({"key-type": "RSA-1024"}, ("volumeAttributes.key-type", "use one of", "RSA-2048")),
    ({"fs-group": "staff"}, ("volumeAttributes.fs-group", "is not a group ID")),
    ({"fs-group": "-1"}, ("volumeAttributes.fs-group", "is not a group ID")),
    ({"fs-group": "4294967296"}, ("volumeAttributes.fs-group", "is not a group ID")),
    ({"uri-sans": "javascript:alert(1)"}, ("volumeAttributes.uri-sans",)),
    ({"duration": "-1h", "fs-group": "x", "typo": "y"}, ("(1)", "(3)", "duration", "fs-group", "typo")),
]


def tokens_of(text: object) -> str:
    return json.dumps({POD_AUDIENCE: {"token": text}})


def _unsigned(claims: dict[str, Any]) -> str:
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"e30.{part}.x"


@dataclass(frozen=True)
class BadToken:
    """Invalid tokens of a publish call, and the expected error."""

    make: Callable[[FakePod], str]
    text: str = "pod token"
    reason: str = "TokenRejected"
    code: grpc.StatusCode = DENIED


_NO_AUDIENCE = "tokenRequests with audience certmount"
_MISSING = ("tokenRequests in the CSIDriver object", "TokenMissing", UNAVAILABLE)

BAD_TOKENS = {
    "none": BadToken(lambda _: "", *_MISSING),
    "empty": BadToken(lambda _: tokens_of(""), *_MISSING),
    "no-text": BadToken(lambda _: tokens_of(5), *_MISSING),
    "no-json": BadToken(lambda _: "{", _NO_AUDIENCE),
    "no-object": BadToken(lambda _: "[1]", _NO_AUDIENCE),
    "deep": BadToken(lambda _: "[" * 100_000, _NO_AUDIENCE),
    "other-audience": BadToken(lambda pod: json.dumps({"vault": {"token": pod.token()}}), _NO_AUDIENCE),
    "garbage": BadToken(lambda _: tokens_of("garbage"), "is not a JSON Web Token"),
    "no-base64": BadToken(lambda _: tokens_of("a.%%%.c"), "has invalid claims"),
    "huge": BadToken(lambda pod: tokens_of(pod.token(x="y" * 20_000))),
    "surrogates": BadToken(lambda pod: tokens_of("\ud800" + pod.token())),
    "expired": BadToken(
        lambda pod: tokens_of(pod.token(exp=int(time.time()) - 60)), "the node's clock", "TokenExpired", UNAVAILABLE
    ),
    "expiry-beyond-numbers": BadToken(lambda pod: tokens_of(pod.token(exp=10**400))),
    "no-pod": BadToken(lambda pod: tokens_of(pod.token(**{"kubernetes.io": {"namespace": "web"}})), "bound to a pod"),
    "other-pod": BadToken(lambda _: tokens_of(FakePod().token()), "not pod web/shop"),
    "other-account": BadToken(lambda pod: tokens_of(FakePod(service_account="root", uid=pod.uid).token())),
    "other-namespace": BadToken(
        lambda pod: tokens_of(FakePod(namespace="prod", uid=pod.uid).token()), "not pod web/shop"
    ),
    "two-subjects": BadToken(
        lambda pod: tokens_of(pod.token(sub="system:serviceaccount:web:root")),
        "different service accounts in its subject and its other claims",
    ),
    "hostile-name": BadToken(lambda pod: tokens_of(FakePod(name="a\n\x1b[2J\ud800" * 50, uid=pod.uid).token())),
    "no-node": BadToken(
        lambda pod: tokens_of(_unsigned(_without_node(pod))),
        "use Kubernetes 1.30 or newer",
        "ClusterNotSupported",
        FAILED,
    ),
}


def _without_node(pod: FakePod) -> dict[str, Any]:
    claims: dict[str, Any] = pod.claims()
    del claims["kubernetes.io"]["node"]
    return claims


def change(request: Request, **fields: Any) -> Request:
    for name, value in fields.items():
        if value is None:
            request.ClearField(name)  # type: ignore[arg-type]  # one of the fields' names
        elif isinstance(value, dict):
            request.volume_context.update(value)
        elif isinstance(value, csi_pb2.VolumeCapability):
            request.volume_capability.CopyFrom(value)
        else:
            setattr(request, name, value)
    return request


_MODE = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
BLOCK = csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=_MODE)
KUBELET = "csi.storage.k8s.io/"

SHAPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "writable": ({"readonly": False}, ("pod.spec.volumes[].csi.readOnly: must be true", "add readOnly: true")),
    "block": ({"volume_capability": BLOCK}, ("block device", "volumeMounts")),
    "no-capability": ({"volume_capability": None}, ("volume_capability: is missing",)),
    "no-pod-info": (
        {"volume_context": {f"{KUBELET}pod.name": "", f"{KUBELET}pod.uid": ""}},
        ("pod.name: is missing", "pod.uid: is missing", "podInfoOnMount: true"),
    ),
    "persistent": (
        {"volume_context": {f"{KUBELET}ephemeral": "false"}},
        ("pod.spec.volumes[]", "not with a PersistentVolume"),
    ),
    "forged-key": (
        {"volume_context": {f"{KUBELET}pod.node": "x"}},
        ("volumeAttributes.csi.storage.k8s.io/pod.node", "is reserved for the kubelet"),
    ),
    "writable-with-unknown-attribute": (
        {"readonly": False, "target_path": "relative", "volume_context": {"typo": "x"}},
        ("(1) pod.spec.volumes[].csi.readOnly", "(2) volumeAttributes.typo", "(3) target_path"),
    ),
    "all-at-once": (
        {"volume_capability": None, "volume_context": {f"{KUBELET}ephemeral": "", f"{KUBELET}x": "y"}},
        ("(1)", "(3)", "volume_capability", "PersistentVolume", "is reserved for the kubelet"),
    ),
}


async def rejects(node: Node, request: Request, code: grpc.StatusCode, reason: str, *words: str) -> Failure:
    """Check that publish fails with this error and leaves nothing."""
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (code, reason), failure.text
    assert failure.text.startswith(f"{reason}: ")
    for word in words:
        assert word in failure.text, failure.text
    assert failure.text.isprintable()
    node.assert_nothing_of(request)
    return failure
