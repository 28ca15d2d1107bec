"""Bad input is a clear error that names the field and the fix, with nothing half mounted."""

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
    refuses,
)
from tests.integration.node.world import Node, failure_of
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import Response, TestCA, answer_of, refused
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("attributes, words", ATTRIBUTES, ids=[str(number) for number in range(len(ATTRIBUTES))])
async def test_attributes(node: Node, attributes: dict[str, str], words: tuple[str, ...]) -> None:
    """The pod's author hears of every fault at once, in the words of the pod's spec; the authority is not bothered."""
    await refuses(node, node.request(attributes=attributes), INVALID, "InvalidAttributes", *words)
    assert node.script.calls == 0


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
    failure = await refuses(node, request, bad.code, bad.reason, bad.words)
    assert len(tokens) < 20 or tokens[:40] not in failure.text
    assert node.script.calls == 0


async def test_an_alg_none_token_is_the_authoritys_to_refuse(node: Node) -> None:
    """The node does not judge signatures: it passes the token on and gives the authority's refusal to the pod's event."""
    pod = FakePod()
    node.script.failure = CertmountError(Reason.TOKEN_REJECTED, "pod token: is not signed by this cluster")
    request = node.request(pod, token=jwt.encode(pod.claims(), "", algorithm="none"))
    await refuses(node, request, DENIED, "TokenRejected", "pod token: is not signed by this cluster")


@pytest.mark.parametrize("shape", SHAPES)
async def test_requests(node: Node, shape: str) -> None:
    """What can't be a certificate volume of a pod is told in the words of the pod's spec or the CSIDriver object."""
    fields, words = SHAPES[shape]
    await refuses(node, change(node.request(), **fields), INVALID, "InvalidRequest", *words)
    assert node.script.calls == 0


@pytest.mark.parametrize("group", ["staff", "-1", "1.5", "99999999999", " 5"])
async def test_fs_group(node: Node, group: str) -> None:
    """An fsGroup that is no group id is not guessed at."""
    await refuses(node, node.request(fs_group=group), INVALID, "InvalidRequest", "pod.spec.securityContext.fsGroup")


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


async def test_the_authoritys_refusal_reaches_the_user(node: Node) -> None:
    """The reason and the words of the authority are the kubelet's error, and so the pod's event; a fixed policy lets the pod start."""
    node.script.failure = refused("shop.example.com")
    request = node.request(attributes={"name": "shop.example.com"})
    await refuses(node, request, DENIED, "NameNotAllowed", "shop.example.com: no policy rule allows this name")
    node.script.failure = None
    await node.publish(request)
    assert node.shown(request).names


async def test_an_authority_that_is_away(node: Node) -> None:
    """Not final for the kubelet: UNAVAILABLE, nothing left, and the next try succeeds when the authority is back."""
    await node.authority.stop()
    request = node.request()
    await refuses(node, request, UNAVAILABLE, "AuthorityUnavailable")
    await node.authority.start()
    await node.publish(request)
    assert node.shown(request).names


async def test_an_authority_of_another_root(node: Node) -> None:
    """Who can't prove to be the authority gets no token and no say."""
    pem = node.authority.root_file.read_bytes()
    node.authority.root_file.write_bytes(TestCA("somebody").pem)
    try:
        await refuses(node, node.request(), UNAVAILABLE, "AuthorityUnavailable")
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
        failure = await refuses(
            node, node.request(), UNAVAILABLE, "NodeTokenMissing", "projected token with audience certmount-node"
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


SOMEBODY = TestCA("somebody")


@pytest.mark.parametrize(
    "answer, words",
    [
        (answer_of([], [SOMEBODY.der]), "chain holds 0 certificates"),
        (Response(chain=[b"x"]), "came without the roots of internal"),
        (answer_of([b"x"], [SOMEBODY.der]), "chain does not parse as X.509 in DER"),
        (answer_of([SOMEBODY.der], [b"y"]), "does not parse as X.509 in DER"),
        (answer_of([b"x"] * 50, [SOMEBODY.der]), "expected were 1 to 10"),
        (answer_of([b"x" * 100_000], [SOMEBODY.der]), "holds a certificate of more than"),
        (answer_of([SOMEBODY.der], [SOMEBODY.der]), "another key"),
    ],
    ids=["empty", "no-roots", "garbage", "bad-roots", "many", "big", "other"],
)
async def test_answers(node: Node, answer: Response, words: str) -> None:
    """An answer that does not fit is not written; it may be better next time, so it is not final for the kubelet."""
    node.script.tamper = lambda _: answer
    await refuses(node, node.request(), UNAVAILABLE, "InvalidResponse", words)
