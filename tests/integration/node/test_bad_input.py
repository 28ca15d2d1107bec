"""Invalid input is an error that names the field and the fix. Nothing is mounted."""

from __future__ import annotations

import shutil

import jwt
import pytest

from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.bad_input import (
    ATTRIBUTES,
    BAD_TOKENS,
    DENIED,
    INVALID,
    SHAPES,
    TOKENS,
    UNAVAILABLE,
    change,
    rejects,
)
from tests.integration.node.world import Node, failure_of
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import Response, TestCA, name_not_allowed, response_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("attributes, words", ATTRIBUTES, ids=[str(number) for number in range(len(ATTRIBUTES))])
async def test_invalid_attributes_are_rejected(node: Node, attributes: dict[str, str], words: tuple[str, ...]) -> None:
    """With all faults. The authority receives no request."""
    await rejects(node, node.request(attributes=attributes), INVALID, "InvalidAttributes", *words)
    assert node.script.calls == 0


@pytest.mark.parametrize("in_secrets", [False, True], ids=["volume_context", "secrets"])
@pytest.mark.parametrize("kind", BAD_TOKENS)
async def test_invalid_tokens_are_rejected(node: Node, kind: str, in_secrets: bool) -> None:
    """The driver does not send them, and the error does not show them."""
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
    """In terms of the pod spec or the CSIDriver object."""
    fields, words = SHAPES[shape]
    await rejects(node, change(node.request(), **fields), INVALID, "InvalidRequest", *words)
    assert node.script.calls == 0


@pytest.mark.parametrize("group", ["staff", "-1", "1.5", "99999999999", " 5"])
async def test_invalid_fs_group_is_rejected(node: Node, group: str) -> None:
    """The error names the field of the pod spec."""
    await rejects(node, node.request(fs_group=group), INVALID, "InvalidRequest", "pod.spec.securityContext.fsGroup")


@pytest.mark.parametrize("field", ["volume_id", "target_path"])
async def test_missing_fields_are_rejected(node: Node, field: str) -> None:
    """As the CSI specification requires."""
    request = change(node.kubelet.publish_request(FakePod()), **{field: None})
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (INVALID, "InvalidRequest")
    assert f"{field}: is empty" in failure.text
    shutil.rmtree(node.pod_dir(request))


@pytest.mark.parametrize("volume_id", ["../../escape", "a/b", ".", "..", "ünï\u202e", "x" * 256, "sp ace\n"])
async def test_any_volume_id_is_accepted(node: Node, volume_id: str) -> None:
    """Its directory is always in the driver's own directory."""
    request = node.kubelet.publish_request(FakePod(), volume_id=volume_id)
    await node.publish(request)
    assert node.shown(request).names
    (directory,) = node.volumes.iterdir()
    assert len(directory.name) == 64
    await node.unpublish(request)
    shutil.rmtree(node.pod_dir(request))


async def test_error_of_the_authority_reaches_the_pods_events(node: Node) -> None:
    """After a policy change, the pod starts."""
    node.script.failure = name_not_allowed("shop.example.com")
    request = node.request(attributes={"name": "shop.example.com"})
    await rejects(node, request, DENIED, "NameNotAllowed", "shop.example.com: no policy rule allows this name")
    node.script.failure = None
    await node.publish(request)
    assert node.shown(request).names


async def test_unavailable_authority_is_retryable(node: Node) -> None:
    """The next call succeeds when it is available again."""
    await node.authority.stop()
    request = node.request()
    await rejects(node, request, UNAVAILABLE, "AuthorityUnavailable")
    await node.authority.start()
    await node.publish(request)
    assert node.shown(request).names


async def test_authority_with_another_root_gets_no_token(node: Node) -> None:
    """The TLS handshake fails."""
    pem = node.authority.root_file.read_bytes()
    node.authority.root_file.write_bytes(TestCA("other").pem)
    try:
        await rejects(node, node.request(), UNAVAILABLE, "AuthorityUnavailable")
        assert node.script.calls == 0
    finally:
        node.authority.root_file.write_bytes(pem)


@pytest.mark.parametrize("content", [None, b"", b"two\nlines", b"\xff\xfe\0", b"sp ace", b"x" * 2_000_000])
async def test_invalid_node_token_is_reported(node: Node, content: bytes | None) -> None:
    """The error does not show it, and the driver continues."""
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
    """The trust stream fails and is retried."""
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


OTHER_CA = TestCA("other")


@pytest.mark.parametrize(
    "answer, words",
    [
        (response_of([], [OTHER_CA.der]), "chain: has 0 certificates"),
        (Response(chain=[b"x"]), "does not contain the roots of internal"),
        (response_of([b"x"], [OTHER_CA.der]), "chain: a certificate is not valid X.509 DER"),
        (response_of([OTHER_CA.der], [b"y"]), "a certificate is not valid X.509 DER"),
        (response_of([b"x"] * 50, [OTHER_CA.der]), "expected 1 to 10"),
        (response_of([b"x" * 100_000], [OTHER_CA.der]), "a certificate has more than"),
        (response_of([OTHER_CA.der], [OTHER_CA.der]), "is not the key of the request"),
    ],
    ids=["empty", "no-roots", "garbage", "bad-roots", "many", "big", "other"],
)
async def test_invalid_responses_are_rejected(node: Node, answer: Response, words: str) -> None:
    """Nothing is written. The error is retryable."""
    node.script.tamper = lambda _: answer
    await rejects(node, node.request(), UNAVAILABLE, "InvalidResponse", words)
