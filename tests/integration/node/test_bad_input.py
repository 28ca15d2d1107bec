"""Invalid input is an error that names the field and the fix. Nothing is mounted, and no republish affects a mounted volume."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import jwt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.world import CallFailure, Node, Request, failure_of
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import TestCA, name_not_allowed
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
INVALID, DENIED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
FAILED, UNAVAILABLE = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE


ATTRIBUTES: list[tuple[dict[str, str], tuple[str, ...]]] = [
    ({"dns-name": "a.example.com"}, ("volumeAttributes.dns-name: is unknown", "use dns-names")),
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
    (
        {"uri-sans": "https://a.example/b%2fc%s"},
        ("volumeAttributes.uri-sans: 'https://a.example/b\uff052fc\uff05s' is not",),
    ),
    ({"name": "a\u202eb"}, ("volumeAttributes.name: 'a\\u202eb' has non-ASCII",)),
    (
        {"email-sans": ",".join(["%" * 80 + f"{number}" for number in range(90)])},
        ("volumeAttributes.email-sans: '\uff05",),
    ),
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
        lambda pod: tokens_of(pod.token(exp=int(time.time()) - 60)),
        "the clocks of the node",
        "TokenExpired",
        UNAVAILABLE,
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


async def rejects(node: Node, request: Request, code: grpc.StatusCode, reason: str, *words: str) -> CallFailure:
    """Check that publish fails with this error and leaves nothing."""
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (code, reason), failure.text
    assert failure.text.startswith(f"{reason}: ")
    for word in words:
        assert word in failure.text, failure.text
    assert failure.text.isprintable()
    node.assert_nothing_of(request)
    return failure


@pytest.mark.parametrize("attributes, words", ATTRIBUTES, ids=[str(number) for number in range(len(ATTRIBUTES))])
async def test_invalid_attributes_are_rejected(node: Node, attributes: dict[str, str], words: tuple[str, ...]) -> None:
    await rejects(node, node.request(attributes=attributes), INVALID, "InvalidAttributes", *words)
    assert node.script.calls == 0


@pytest.mark.parametrize("in_secrets", [False, True], ids=["volume_context", "secrets"])
@pytest.mark.parametrize("kind", BAD_TOKENS)
async def test_invalid_tokens_are_rejected(node: Node, kind: str, in_secrets: bool) -> None:
    bad, pod = BAD_TOKENS[kind], FakePod()
    request, tokens = node.request(pod, token=None), bad.make(pod)
    if in_secrets:
        request.secrets[TOKENS] = tokens
    else:
        request.volume_context[TOKENS] = tokens
    failure = await rejects(node, request, bad.code, bad.reason, bad.text)
    assert len(tokens) < 20 or tokens[:40] not in failure.text
    assert node.script.calls == 0


async def test_unsigned_token_is_rejected_by_the_authority(node: Node) -> None:
    """The driver does not verify signatures."""
    pod = FakePod()
    node.script.failure = CertmountError(Reason.TOKEN_REJECTED, "pod token: is not signed by this cluster")
    request = node.request(pod, token=jwt.encode(pod.claims(), "", algorithm="none"))
    await rejects(node, request, DENIED, "TokenRejected", "pod token: is not signed by this cluster")


@pytest.mark.parametrize("shape", SHAPES)
async def test_invalid_calls_are_rejected(node: Node, shape: str) -> None:
    fields, words = SHAPES[shape]
    await rejects(node, change(node.request(), **fields), INVALID, "InvalidRequest", *words)
    assert node.script.calls == 0


@pytest.mark.parametrize("group", ["staff", "-1", "1.5", "99999999999", " 5"])
async def test_invalid_fs_group_is_rejected(node: Node, group: str) -> None:
    await rejects(node, node.request(fs_group=group), INVALID, "InvalidRequest", "pod.spec.securityContext.fsGroup")


@pytest.mark.parametrize("field", ["volume_id", "target_path"])
async def test_missing_fields_are_rejected(node: Node, field: str) -> None:
    request = change(node.kubelet.publish_request(FakePod()), **{field: None})
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (INVALID, "InvalidRequest")
    assert f"{field}: is empty" in failure.text
    shutil.rmtree(node.pod_dir(request))


@pytest.mark.parametrize("volume_id", ["../../escape", "a/b", ".", "..", "ünï\u202e", "x" * 256, "sp ace\n"])
async def test_any_volume_id_is_accepted(node: Node, volume_id: str) -> None:
    request = node.kubelet.publish_request(FakePod(), volume_id=volume_id)
    await node.publish(request)
    assert node.shown(request).names
    (directory,) = node.volumes.iterdir()
    assert len(directory.name) == 64
    await node.unpublish(request)
    shutil.rmtree(node.pod_dir(request))


async def test_error_of_the_authority_reaches_the_pods_events(node: Node) -> None:
    node.script.failure = name_not_allowed("shop.example.com")
    request = node.request(attributes={"name": "shop.example.com"})
    await rejects(node, request, DENIED, "NameNotAllowed", "shop.example.com: no policy rule allows this name")
    node.script.failure = None
    await node.publish(request)
    assert node.shown(request).names


async def test_unavailable_authority_is_retryable(node: Node) -> None:
    await node.authority.stop()
    request = node.request()
    await rejects(node, request, UNAVAILABLE, "AuthorityUnavailable")
    await node.authority.start()
    await node.publish(request)
    assert node.shown(request).names


async def test_authority_with_another_root_gets_no_token(node: Node) -> None:
    pem = node.authority.root_file.read_bytes()
    node.authority.root_file.write_bytes(TestCA("other").pem)
    try:
        await rejects(node, node.request(), UNAVAILABLE, "AuthorityUnavailable")
        assert node.script.calls == 0
    finally:
        node.authority.root_file.write_bytes(pem)


@pytest.mark.parametrize("content", [None, b"", b"two\nlines", b"\xff\xfe\0", b"sp ace", b"x" * 2_000_000])
async def test_invalid_node_token_is_reported(node: Node, content: bytes | None) -> None:
    path = node.authority.token_file
    good = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        failure = await rejects(
            node, node.request(), UNAVAILABLE, "NodeTokenMissing", "projected token with audience certmount-node"
        )
        assert not content or content.decode(errors="replace")[:40] not in failure.text
    finally:
        path.write_bytes(good)
    await node.published()


async def test_driver_runs_and_starts_with_an_invalid_node_token(node: Node) -> None:
    path = node.authority.token_file
    good = path.read_bytes()
    await node.restart()
    await node.watched()
    path.write_bytes(b"two\nlines")
    try:
        logged = len(node.driver.events("trust stream failed"))
        await node.authority.stop()
        await node.authority.start()
        await until(lambda: len(node.driver.events("trust stream failed")) > logged, "the driver opens the stream")
        assert node.driver.get("/healthz") == (200, "ok\n")
        await node.restart()
    finally:
        path.write_bytes(good)
    await node.published()


def _put_token(bad: BadToken, request: Request) -> None:
    request.volume_context[TOKENS] = bad.make(FakePod())


_INVALID: dict[str, Callable[[Request], object]] = {
    **{shape: partial(change, **fields) for shape, (fields, _) in SHAPES.items() if "target_path" not in fields},
    "no-context": lambda request: request.volume_context.clear(),
    "unknown-attribute": lambda request: change(request, volume_context={"typo": "x"}),
    "hostile-attribute": lambda request: change(request, volume_context={"name": "\0\ud7ff" * 1000}),
    "writable-with-unknown-attribute": lambda request: change(request, readonly=False, volume_context={"typo": "x"}),
    "other-pod": lambda request: change(request, volume_context={f"{KUBELET}pod.uid": "other"}),
    "bad-group": lambda request: setattr(request.volume_capability.mount, "volume_mount_group", "x"),
    **{f"token-{kind}": partial(_put_token, bad) for kind, bad in BAD_TOKENS.items()},
}


@pytest.mark.parametrize("fault", _INVALID)
async def test_republish_of_a_mounted_volume_never_fails(node: Node, fault: str) -> None:
    """The kubelet would remove the mount."""
    pod = FakePod()
    request = await node.published(pod)
    state, shown = node.state(request), node.shown(request)
    bad = node.kubelet.publish_request(pod)
    _INVALID[fault](bad)
    await node.publish(bad)
    assert (node.state(request), node.shown(request), node.script.calls) == (state, shown, 1)


_contexts = st.dictionaries(
    st.one_of(st.text(max_size=20), st.sampled_from([f"{KUBELET}pod.uid", f"{KUBELET}ephemeral", TOKENS, "name"])),
    st.one_of(st.text(max_size=50), st.sampled_from(["{}", tokens_of("a.e30.c"), "[" * 3000, "0" * 300])),
    max_size=6,
)


@given(context=_contexts, secrets=_contexts, read_only=st.booleans(), group=st.text(max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
async def test_republish_with_any_content_never_fails(
    node: Node, context: dict[str, str], secrets: dict[str, str], read_only: bool, group: str
) -> None:
    pod = FakePod(uid="survivor")
    request = node.kubelet.publish_request(pod)
    if not node.target(request).exists():
        await node.publish(node.request(pod))
    state = node.state(request)
    request.volume_context.update(context)
    request.secrets.update(secrets)
    request.readonly, request.volume_capability.mount.volume_mount_group = read_only, group
    await node.publish(request)
    assert (node.state(request), node.script.calls) == (state, 1)
