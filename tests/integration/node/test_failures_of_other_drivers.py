"""Failures of other certificate drivers, tested with this one. Other modules test further ones: test_unpublish, test_canary."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver._proto.csi_pb2 import DEGRADED
from csi_driver.core.names import Names, spiffe_id
from tests.integration.node.test_bad_input import UNAVAILABLE, rejects
from tests.integration.node.world import Node, Request, Shown, make_due, running_node
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import Response, TestCA, response_of, roots_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOON = timedelta(seconds=1)


async def test_concurrent_publish_calls_return_a_complete_volume(node: Node) -> None:
    """Failure: the second of two concurrent calls succeeds while the volume is empty.

    Here the volume is complete when any call returns, and one certificate serves all calls.
    """
    for _ in range(3):
        node.script.delay_s = 0.2
        request = node.request()
        seen: list[Shown] = []

        async def publish(request: Request = request, seen: list[Shown] = seen) -> None:
            await node.publish(request)
            seen.append(node.shown(request))

        calls = node.script.calls
        await asyncio.gather(*(publish() for _ in range(20)))
        assert len(seen) == 20
        assert len({shown.serial for shown in seen}) == 1
        assert node.script.calls == calls + 1


@pytest.mark.root
async def test_full_file_system_does_not_affect_a_mounted_volume(node: Node) -> None:
    """Failure: a republish that gets ENOSPC unmounts and deletes the volume.

    Here republishes and renewals leave the volume unchanged, report the reason, and succeed when there is space.
    """
    node.script.renew_after = SOON
    pod = FakePod()
    request = await node.published(pod)
    filler = node.volume_dir(request) / "filler"
    _fill(filler)
    before, mounts = node.shown(request), node.mounts(node.kubelet.root)
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="NoSpace"), "a renewal without space")
    for _ in range(3):
        await node.publish(node.kubelet.publish_request(pod))
    assert (node.shown(request), node.mounts(node.kubelet.root)) == (before, mounts)
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "NoSpace")
    assert "No space left on device" in message
    await node.restart()
    await node.publish(node.kubelet.publish_request(pod))
    assert (node.shown(request), node.mounts(node.kubelet.root)) == (before, mounts)
    filler.unlink()
    await until(lambda: node.shown(request).serial != before.serial, "the renewal")
    assert await node.health(request) == []


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _signed(
    ca: TestCA,
    answer: Response,
    *,
    own_key: bool = True,
    account: str = "shop",
    is_ca: bool = False,
    life_s: int = 3600,
) -> Response:
    """Return the response with another certificate of the CA that has one fault."""
    key = x509.load_der_x509_certificate(answer.chain[0]).public_key()
    if not own_key:
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    names = Names.of([], [spiffe_id("cluster.local", "web", account)])
    leaf = ca.sign(key, names, timedelta(seconds=life_s), ca=is_ca)
    return response_of([leaf.public_bytes(Encoding.DER)], roots_of(answer))


_NOT_DER, _NO_ROOTS = "a certificate is not valid X.509 DER", "does not contain the roots of internal"
_INVALID: dict[str, tuple[Callable[[TestCA, Response], Response], str]] = {
    "text": (lambda *_: response_of([b"not PEM, not DER"], [b"neither"]), _NOT_DER),
    "pem": (lambda _, answer: response_of([b"-----BEGIN CERTIFICATE-----"], roots_of(answer)), f"chain: {_NOT_DER}"),
    "empty": (lambda *_: Response(), _NO_ROOTS),
    "no-chain": (lambda _, answer: response_of([], roots_of(answer)), "chain: has 0 certificates"),
    "no-roots": (lambda _, answer: Response(chain=answer.chain), _NO_ROOTS),
    "cut": (lambda _, answer: response_of([answer.chain[0][:-1]], roots_of(answer)), f"chain: {_NOT_DER}"),
    "long": (lambda _, answer: response_of([answer.chain[0] + b"\0"], roots_of(answer)), f"chain: {_NOT_DER}"),
    "roots": (lambda _, answer: response_of(answer.chain, [b""]), _NOT_DER),
    "many": (lambda _, answer: response_of([b"x"] * 50, roots_of(answer)), "expected 1 to 10"),
    "big": (lambda _, answer: response_of([b"x" * 100_000], roots_of(answer)), "a certificate has more than"),
    "expired": (lambda ca, answer: _signed(ca, answer, life_s=-10), "chain[0] expired at"),
    "wrong-key": (lambda ca, answer: _signed(ca, answer, own_key=False), "is not the key of the request"),
    "other-account": (lambda ca, answer: _signed(ca, answer, account="root"), "the SPIFFE ID that ends in"),
    "authority": (lambda ca, answer: _signed(ca, answer, is_ca=True), "the leaf is a CA certificate"),
    "other-root": (lambda _, answer: response_of(answer.chain, [TestCA("another").der]), "not end at a trusted root"),
}


@pytest.mark.parametrize("fault", _INVALID)
async def test_invalid_response_is_neither_written_nor_fatal(node: Node, fault: str) -> None:
    """Failure: a response that is not PEM crashes the process; an expired certificate, or one for another key, is written.

    Here only that call or renewal fails, with a reason, and a mounted volume keeps its files.
    """
    make, words = _INVALID[fault]
    good = node.script.tamper
    node.script.renew_after = SOON
    live = await node.published()
    before, pid = node.shown(live), node.driver.pid
    node.script.tamper = lambda answer: make(node.authority.ca, answer)
    request = node.request(FakePod(name="new"))
    await rejects(node, request, UNAVAILABLE, "InvalidResponse", words)
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="InvalidResponse"), "a failed renewal")
    assert node.shown(live) == before
    node.script.tamper = good
    await node.publish(request)
    assert node.shown(request).names
    assert node.driver.pid == pid


@pytest.mark.root
@pytest.mark.peers("unshare")
async def test_pods_see_renewals_of_a_restarted_driver() -> None:
    """Failure: after a restart pods never see a renewal, because the new driver writes to a new tmpfs.

    Here the driver and the pod have their own mount namespaces. Drivers and their namespaces are killed, and the pod sees
    each renewal in its first mount, read-only.
    """
    async with running_node(within=["unshare", "--mount", "--propagation", "unchanged"]) as node:
        pod = FakePod()
        request = await node.published(pod)
        async with _namespace() as root:
            target = root / request.target_path.lstrip("/")
            seen = {Shown.at(target).serial}
            with pytest.raises(OSError, match="Read-only"):
                (target / "new").touch()
            for _ in range(2):
                node.script.renew_after = SOON
                await make_due(node, request)
                await node.driver.start()
                await node.publish(node.kubelet.publish_request(pod))
                await until(lambda: Shown.at(target).serial not in seen, "the pod sees the renewal")
                seen.add(Shown.at(target).serial)
            assert Shown.at(target) == node.shown(request)
        await node.unpublish(request)
        node.assert_nothing_of(request)


@contextlib.asynccontextmanager
async def _namespace() -> AsyncIterator[Path]:
    """Return the root directory of a process with a copy of our mount namespace, as a pod has."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; exec cat"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdin
    assert process.stdout
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield Path(f"/proc/{process.pid}/root")
    finally:
        process.stdin.close()
        await process.wait()
