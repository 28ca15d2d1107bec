"""Bad input is a clear error that names the field and the fix, with nothing half mounted; a live volume shrugs it off."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.host import syscalls
from tests.integration.node.world import Failure, Node, Request, failure_of
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import Response, TestCA, refused
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"
INVALID, DENIED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
FAILED, UNAVAILABLE = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE


async def _refused(node: Node, request: Request, code: grpc.StatusCode, reason: str, *words: str) -> Failure:
    """Publishing fails as expected, says so in the expected words, and leaves nothing."""
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (code, reason), failure.text
    assert failure.text.startswith(f"{reason}: ")
    for word in words:
        assert word in failure.text
    assert failure.text.isprintable()
    node.assert_nothing_of(request)
    return failure


ATTRIBUTES: list[tuple[dict[str, str], tuple[str, ...]]] = [
    ({"dns-name": "a.example.com"}, ("volumeAttributes.dns-name: is not known", "did you mean dns-names?")),
    ({"issuer": "x", "bogus": "y"}, ("volumeAttributes.issuer", "volumeAttributes.bogus", "known are")),
    ({"name": ""}, ("volumeAttributes.name: is empty", "leave it away")),
    ({"name": "a" * 64 + ".example.com"}, ("volumeAttributes.name",)),
    ({"dns-names": "x" * 40_000}, ("volumeAttributes.dns-names: is 40000 characters long",)),
    ({"dns-names": ",".join(f"n{number}.example.com" for number in range(1000))}, ("1000 names", "at most 100")),
    ({"name": "*"}, ("volumeAttributes.name",)),
    ({"name": "a.*.example.com"}, ("volumeAttributes.name",)),
    ({"name": "bücher.example"}, ("volumeAttributes.name", "\\xfc")),
    ({"name": "a\nb\x1b[31m\0.example.com"}, ("volumeAttributes.name", "\\n", "\\x1b", "\\x00")),
    ({"na\nme": "x"}, ("volumeAttributes.na\\nme",)),
    ({"duration": "-5m"}, ("volumeAttributes.duration", "is negative")),
    ({"duration": "0s"}, ("volumeAttributes.duration", "the least is 10s")),
    ({"duration": "1 hour"}, ("volumeAttributes.duration", "such as 1h30m")),
    ({"duration": "1h", "renew-before": "2h"}, ("volumeAttributes.renew-before", "not shorter than")),
    ({"duration": "1h", "renew-before": "0s"}, ("volumeAttributes.renew-before", "is zero")),
    ({"key-type": "RSA-1024"}, ("volumeAttributes.key-type", "choose one of", "RSA-2048")),
    ({"fs-group": "staff"}, ("volumeAttributes.fs-group", "is not a group id")),
    ({"fs-group": "-1"}, ("volumeAttributes.fs-group", "is not a group id")),
    ({"fs-group": "4294967296"}, ("volumeAttributes.fs-group", "is not a group id")),
    ({"uri-sans": "javascript:alert(1)"}, ("volumeAttributes.uri-sans",)),
    ({"duration": "-1h", "fs-group": "x", "typo": "y"}, ("(1)", "(3)", "duration", "fs-group", "typo")),
]


@pytest.mark.parametrize("attributes, words", ATTRIBUTES, ids=[str(number) for number in range(len(ATTRIBUTES))])
async def test_attributes(node: Node, attributes: dict[str, str], words: tuple[str, ...]) -> None:
    """The pod's author hears of every fault at once, in the words of the pod's spec; the authority is not bothered."""
    await _refused(node, node.request(attributes=attributes), INVALID, "InvalidAttributes", *words)
    assert node.script.calls == 0


def _tokens(text: object) -> str:
    return json.dumps({POD_AUDIENCE: {"token": text}})


def _unsigned(claims: dict[str, Any]) -> str:
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"e30.{part}.x"


@dataclass(frozen=True)
class BadToken:
    """What stands where the kubelet puts tokens, for a pod; and what is said to it."""

    make: Callable[[FakePod], str]
    code: grpc.StatusCode
    reason: str
    words: str


BAD_TOKENS = {
    "none": BadToken(lambda _: "", UNAVAILABLE, "TokenMissing", "tokenRequests in the CSIDriver object"),
    "empty": BadToken(lambda _: _tokens(""), UNAVAILABLE, "TokenMissing", "tokenRequests in the CSIDriver object"),
    "no-json": BadToken(lambda _: "{", DENIED, "IdentityRefused", "tokenRequests with audience certmount"),
    "no-object": BadToken(lambda _: "[1]", DENIED, "IdentityRefused", "tokenRequests with audience certmount"),
    "deep": BadToken(lambda _: "[" * 100_000, DENIED, "IdentityRefused", "tokenRequests with audience certmount"),
    "other-audience": BadToken(
        lambda pod: json.dumps({"vault": {"token": pod.token()}}), DENIED, "IdentityRefused", "with audience certmount"
    ),
    "garbage": BadToken(lambda _: _tokens("garbage"), DENIED, "IdentityRefused", "is not a JSON Web Token"),
    "no-text": BadToken(lambda _: _tokens(5), UNAVAILABLE, "TokenMissing", "tokenRequests in the CSIDriver object"),
    "no-base64": BadToken(lambda _: _tokens("a.%%%.c"), DENIED, "IdentityRefused", "cannot be read"),
    "huge": BadToken(lambda pod: _tokens(pod.token(x="y" * 20_000)), DENIED, "IdentityRefused", "pod token"),
    "surrogates": BadToken(lambda pod: _tokens("\ud800" + pod.token()), DENIED, "IdentityRefused", "pod token"),
    "expired": BadToken(
        lambda pod: _tokens(pod.token(exp=int(time.time()) - 60)), UNAVAILABLE, "TokenExpired", "the node's clock"
    ),
    "expiry-beyond-numbers": BadToken(
        lambda pod: _tokens(pod.token(exp=10**400)), DENIED, "IdentityRefused", "pod token"
    ),
    "no-pod": BadToken(
        lambda pod: _tokens(pod.token(**{"kubernetes.io": {"namespace": "web"}})),
        DENIED,
        "IdentityRefused",
        "bound to a pod",
    ),
    "other-pod": BadToken(lambda _: _tokens(FakePod().token()), DENIED, "IdentityRefused", "not pod web/shop"),
    "other-account": BadToken(
        lambda pod: _tokens(FakePod(service_account="root", uid=pod.uid).token()),
        DENIED,
        "IdentityRefused",
        "pod token",
    ),
    "other-namespace": BadToken(
        lambda pod: _tokens(FakePod(namespace="prod", uid=pod.uid).token()),
        DENIED,
        "IdentityRefused",
        "not pod web/shop",
    ),
    "two-subjects": BadToken(
        lambda pod: _tokens(pod.token(sub="system:serviceaccount:web:root")),
        DENIED,
        "IdentityRefused",
        "another in its claims",
    ),
    "hostile-name": BadToken(
        lambda pod: _tokens(FakePod(name="a\n\x1b[2J\ud800" * 50, uid=pod.uid).token()),
        DENIED,
        "IdentityRefused",
        "pod token",
    ),
    "no-node": BadToken(
        lambda pod: _tokens(_unsigned(_without_node(pod))), FAILED, "ClusterUnsupported", "needs Kubernetes 1.30"
    ),
}


def _without_node(pod: FakePod) -> dict[str, Any]:
    claims: dict[str, Any] = pod.claims()
    del claims["kubernetes.io"]["node"]
    return claims


@pytest.mark.parametrize("in_secrets", [False, True], ids=["volume_context", "secrets"])
@pytest.mark.parametrize("kind", BAD_TOKENS)
async def test_tokens(node: Node, kind: str, in_secrets: bool) -> None:
    """A token that can't be this pod's is not sent anywhere, and the answer says what to look at, never the token."""
    bad, pod = BAD_TOKENS[kind], FakePod()
    request, tokens = node.request(pod, token=None), bad.make(pod)
    if in_secrets:
        request.secrets[TOKENS] = tokens
    else:
        request.volume_context[TOKENS] = tokens
    failure = await _refused(node, request, bad.code, bad.reason, bad.words)
    assert len(tokens) < 20 or tokens[:40] not in failure.text
    assert node.script.calls == 0


async def test_an_alg_none_token_is_the_authoritys_to_refuse(node: Node) -> None:
    """The node does not judge signatures: it passes the token on and gives the authority's refusal to the pod's event."""
    pod = FakePod()
    node.script.failure = CertmountError(Reason.IDENTITY_REFUSED, "pod token: is not signed by this cluster")
    request = node.request(pod, token=jwt.encode(pod.claims(), "", algorithm="none"))
    await _refused(node, request, DENIED, "IdentityRefused", "pod token: is not signed by this cluster")


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
_BLOCK = csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=_MODE)
_KUBELET = "csi.storage.k8s.io/"

SHAPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "writable": ({"readonly": False}, ("pod.spec.volumes[].csi.readOnly: must be true", "add readOnly: true")),
    "block": ({"volume_capability": _BLOCK}, ("block device", "volumeMounts")),
    "no-capability": ({"volume_capability": None}, ("volume_capability: is missing",)),
    "no-pod-info": (
        {"volume_context": {f"{_KUBELET}pod.name": "", f"{_KUBELET}pod.uid": ""}},
        ("pod.name: is missing", "pod.uid: is missing", "podInfoOnMount: true"),
    ),
    "persistent": (
        {"volume_context": {f"{_KUBELET}ephemeral": "false"}},
        ("pod.spec.volumes[]", "not by a PersistentVolume"),
    ),
    "forged-key": (
        {"volume_context": {f"{_KUBELET}pod.node": "x"}},
        ("volumeAttributes.csi.storage.k8s.io/pod.node", "only kubelet may use"),
    ),
    "all-at-once": (
        {"volume_capability": None, "volume_context": {f"{_KUBELET}ephemeral": "", f"{_KUBELET}x": "y"}},
        ("(1)", "(3)", "volume_capability", "PersistentVolume", "only kubelet may use"),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_requests(node: Node, shape: str) -> None:
    """What can't be a certificate volume of a pod is told in the words of the pod's spec or the CSIDriver object."""
    fields, words = SHAPES[shape]
    await _refused(node, change(node.request(), **fields), INVALID, "InvalidRequest", *words)
    assert node.script.calls == 0


@pytest.mark.parametrize("group", ["staff", "-1", "1.5", "99999999999", " 5"])
async def test_fs_group(node: Node, group: str) -> None:
    """An fsGroup that is no group id is not guessed at."""
    await _refused(node, node.request(fs_group=group), INVALID, "InvalidRequest", "pod.spec.securityContext.fsGroup")


@pytest.mark.parametrize("field", ["volume_id", "target_path"])
async def test_required_fields(node: Node, field: str) -> None:
    """An empty volume_id or target_path is INVALID_ARGUMENT, as the CSI specification asks."""
    request = change(node.kubelet.publish_request(FakePod()), **{field: None})
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (INVALID, "InvalidRequest")
    assert f"{field}: is empty" in failure.text
    shutil.rmtree(node.pod_dir(request))


@pytest.mark.parametrize("volume_id", ["../../escape", "a/b", ".", "..", "ünï\u202e", "x" * 256, "sp ace\n"])
async def test_strange_volume_ids(node: Node, volume_id: str) -> None:
    """Any id that CSI allows makes a volume inside our own folder, and goes again without a trace."""
    request = node.kubelet.publish_request(FakePod(), volume_id=volume_id)
    await node.publish(request)
    assert node.shown(request).names
    (folder,) = node.volumes.iterdir()
    assert len(folder.name) == 64
    await node.unpublish(request)
    shutil.rmtree(node.pod_dir(request))


@pytest.mark.parametrize("thing", ["file", "symlink", "dangling-symlink", "fifo"])
async def test_a_target_that_is_no_folder(node: Node, thing: str) -> None:
    """What lies at the target is told and stays untouched; once it is removed, the next try succeeds."""
    request, elsewhere = node.request(), node.folder / "elsewhere"
    target = node.target(request)
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "precious").touch()
    if thing == "file":
        target.write_text("precious")
    elif thing == "fifo":
        os.mkfifo(target)
    else:
        target.symlink_to(elsewhere if thing == "symlink" else node.folder / "nowhere")
    before = target.lstat()
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (FAILED, "TargetUnusable")
    assert str(target) in failure.text
    assert "remove it from the node" in failure.text
    assert (target.lstat().st_ino, target.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert (elsewhere / "precious").exists()
    assert not node.volume_dir(request).exists()
    assert (node.mounts(node.kubelet.root), node.script.calls) == ([], 0)
    target.unlink()
    await node.publish(request)
    assert node.shown(request).names


@pytest.mark.root
async def test_a_target_that_others_mounted_on(node: Node) -> None:
    """A stranger's mount is neither covered nor taken away."""
    request = node.request()
    target = node.target(request)
    target.mkdir()
    syscalls.mount("stranger", str(target), "tmpfs", 0, "size=64k")
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (FAILED, "TargetUnusable")
    assert f"umount {target}" in failure.text
    assert [mount.source for mount in node.mounts(node.kubelet.root)] == ["stranger"]
    assert not node.volume_dir(request).exists()
    node.unmount(request)
    await node.publish(request)
    assert node.shown(request).names


@pytest.mark.parametrize(
    "target, code, reason, words",
    [
        (
            "/var/lib/other/pods/{uid}/volumes/x/mount",
            FAILED,
            "KubeletDirectoryWrong",
            "set --kubelet-dir to /var/lib/other",
        ),
        ("/somewhere/else", FAILED, "KubeletDirectoryWrong", "--kubelet-dir"),
        ("{root}/pods/another-pod/volumes/x/mount", FAILED, "TargetUnusable", "its own pod's folder only"),
        ("{root}/pods/{uid}/volumes/none/x/mount", FAILED, "TargetUnusable", "does not exist"),
        ("{root}/pods/{uid}/volumes/../../mount", INVALID, "InvalidRequest", "target_path"),
        ("{root}/pods/{uid}/volumes/x\0/mount", INVALID, "InvalidRequest", "target_path"),
        ("relative/path", INVALID, "InvalidRequest", "is not an absolute path"),
        ("{root}/pods/{uid}/volumes/" + "long/" * 1000 + "mount", INVALID, "InvalidRequest", "target_path"),
        ("{root}/pods/{uid}/volumes/" + "n" * 300 + "/mount", FAILED, "TargetUnusable", "too long"),
    ],
    ids=["other-root", "elsewhere", "other-pod", "no-parent", "dots", "nul", "relative", "long-path", "long-name"],
)
async def test_targets(node: Node, target: str, code: grpc.StatusCode, reason: str, words: str) -> None:
    """A target that is not where this pod's volumes are is refused before anything is asked for or made."""
    pod = FakePod()
    request = node.kubelet.publish_request(pod)
    request.target_path = target.format(root=node.kubelet.root, uid=pod.uid)
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (code, reason), failure.text
    assert words in failure.text
    assert failure.text.isprintable()
    assert not node.volume_dir(request).exists()
    assert (node.mounts(node.kubelet.root), node.script.calls) == ([], 0)
    shutil.rmtree(node.pod_dir(request))


async def test_the_authoritys_refusal_reaches_the_user(node: Node) -> None:
    """The reason and the words of the authority are the kubelet's error, and so the pod's event; a fixed policy lets the pod start."""
    node.script.failure = refused("shop.example.com")
    request = node.request(attributes={"name": "shop.example.com"})
    await _refused(node, request, DENIED, "NameRefused", "shop.example.com: no policy rule allows this name")
    node.script.failure = None
    await node.publish(request)
    assert node.shown(request).names


async def test_an_authority_that_is_away(node: Node) -> None:
    """Not final for the kubelet: UNAVAILABLE, nothing left, and the next try succeeds when the authority is back."""
    await node.authority.stop()
    request = node.request()
    await _refused(node, request, UNAVAILABLE, "AuthorityUnavailable")
    await node.authority.start()
    await node.publish(request)
    assert node.shown(request).names


async def test_an_authority_of_another_root(node: Node) -> None:
    """Who can't prove to be the authority gets no token and no say."""
    pem = node.authority.root_file.read_bytes()
    node.authority.root_file.write_bytes(TestCA("somebody").pem)
    try:
        await _refused(node, node.request(), UNAVAILABLE, "AuthorityUnavailable")
        assert node.script.calls == 0
    finally:
        node.authority.root_file.write_bytes(pem)


@pytest.mark.parametrize("content", [None, b"", b"two\nlines", b"\xff\xfe\0", b"sp ace", b"x" * 2_000_000])
async def test_the_drivers_own_token(node: Node, content: bytes | None) -> None:
    """A node token that is missing or garbage is told as such, does not end the driver, and is never shown."""
    path = node.authority.token_file
    good = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        failure = await _refused(
            node, node.request(), UNAVAILABLE, "TokenMissing", "projected token with audience certmount-node"
        )
        assert not content or content.decode(errors="replace")[:40] not in failure.text
    finally:
        path.write_bytes(good)
    await node.published()


async def test_a_bad_token_of_its_own_does_not_end_the_driver(node: Node) -> None:
    """Neither a driver that runs, when its trust stream is opened anew, nor one that starts."""
    path = node.authority.token_file
    good = path.read_bytes()
    await node.restart()
    await node.watched()
    path.write_bytes(b"two\nlines")
    try:
        logged = len(node.driver.events("roots not followed"))
        await node.authority.stop()
        await node.authority.start()
        await until(lambda: len(node.driver.events("roots not followed")) > logged, "the stream is asked for")
        assert node.driver.get("/healthz") == (200, "ok\n")
        await node.restart()
    finally:
        path.write_bytes(good)
    await node.published()


def _of(ca: TestCA) -> Response:
    return Response(chain=[ca.der], roots=[ca.der])


@pytest.mark.parametrize(
    "answer, words",
    [
        (Response(), "chain holds 0 certificates"),
        (Response(chain=[b"x"], roots=[b"y"]), "does not parse as X.509 in DER"),
        (Response(chain=[b"x"] * 50, roots=[b"y"]), "expected were 1 to 10"),
        (Response(chain=[b"x" * 100_000], roots=[b"y"]), "holds a certificate of more than"),
        (_of(TestCA("somebody")), "another key"),
    ],
    ids=["empty", "garbage", "many", "big", "other"],
)
async def test_answers(node: Node, answer: Response, words: str) -> None:
    """An answer that does not fit is not written; it may be better next time, so it is not final for the kubelet."""
    node.script.tamper = lambda _: answer
    await _refused(node, node.request(), UNAVAILABLE, "AnswerInvalid", words)


def _fill(folder: Path) -> None:
    """Uses up the inodes of the file system."""
    try:
        for number in range(1_000_000):
            (folder / str(number)).touch()
    except OSError as error:
        assert error.errno == errno.ENOSPC


@pytest.mark.root
async def test_a_full_disk(node: Node) -> None:
    """The kubelet's disk has no inode left: RESOURCE_EXHAUSTED, nothing half mounted, live volumes rotate on; with room, it works."""
    live = await node.published()
    filler = node.kubelet.root / "filler"
    filler.mkdir()
    request = node.request()
    try:
        _fill(filler)
        await _refused(node, request, grpc.StatusCode.RESOURCE_EXHAUSTED, "NoSpace", "No space left on device")
        before, pod = node.shown(live), live.volume_context[f"{_KUBELET}pod.uid"]
        await node.publish(node.kubelet.publish_request(FakePod(uid=pod)))
        await node.restart()
        await node.publish(node.kubelet.publish_request(FakePod(uid=pod)))
        assert node.shown(live) == before
    finally:
        shutil.rmtree(filler)
    await node.publish(request)
    assert node.shown(request).names


@pytest.mark.root
async def test_a_full_volume(node: Node) -> None:
    """The volume's own file system can't hold the files (a leftover of this boot fills it): nothing stays of it."""
    request = node.request()
    folder = node.volume_dir(request)
    folder.mkdir()
    syscalls.mount("certmount", str(folder), "tmpfs", 0, "size=64k,mode=0700")
    (folder / "filler").write_bytes(b"x" * 65536)
    words = ("No space left on device", "fewer names or a smaller key make room")
    await _refused(node, request, grpc.StatusCode.RESOURCE_EXHAUSTED, "NoSpace", *words)
    await node.publish(request)
    assert node.shown(request).names


# A volume that its pod has before it.


def _put_token(bad: BadToken, request: Request) -> None:
    request.volume_context[TOKENS] = bad.make(FakePod())


_HARMFUL: dict[str, Callable[[Request], object]] = {
    "writable": lambda request: change(request, readonly=False),
    "block": lambda request: change(request, volume_capability=_BLOCK),
    "no-capability": lambda request: change(request, volume_capability=None),
    "no-context": lambda request: request.volume_context.clear(),
    "unknown-attribute": lambda request: change(request, volume_context={"typo": "x"}),
    "hostile-attribute": lambda request: change(request, volume_context={"name": "\0\ud7ff" * 1000}),
    "forged-key": lambda request: change(request, volume_context={f"{_KUBELET}x": "x"}),
    "other-pod": lambda request: change(request, volume_context={f"{_KUBELET}pod.uid": "other"}),
    "bad-group": lambda request: setattr(request.volume_capability.mount, "volume_mount_group", "x"),
    **{f"token-{kind}": partial(_put_token, bad) for kind, bad in BAD_TOKENS.items()},
}


@pytest.mark.parametrize("harm", _HARMFUL)
async def test_a_live_volume_survives(node: Node, harm: str) -> None:
    """After its first success a republish never fails, whatever it says: the kubelet would take the mount away."""
    pod = FakePod()
    request = await node.published(pod)
    state, shown = node.state(request), node.shown(request)
    bad = node.kubelet.publish_request(pod)
    _HARMFUL[harm](bad)
    await node.publish(bad)
    assert (node.state(request), node.shown(request), node.script.calls) == (state, shown, 1)


_contexts = st.dictionaries(
    st.one_of(st.text(max_size=20), st.sampled_from([f"{_KUBELET}pod.uid", f"{_KUBELET}ephemeral", TOKENS, "name"])),
    st.one_of(st.text(max_size=50), st.sampled_from(["{}", _tokens("a.e30.c"), "[" * 3000, "0" * 300])),
    max_size=6,
)


@given(context=_contexts, secrets=_contexts, read_only=st.booleans(), group=st.text(max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
async def test_a_live_volume_survives_anything(
    node: Node, context: dict[str, str], secrets: dict[str, str], read_only: bool, group: str
) -> None:
    """As above, for whatever may come: always OK, and not a file is touched."""
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
