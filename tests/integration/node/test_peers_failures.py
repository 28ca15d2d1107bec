"""Ten failures that were reproduced with other certificate drivers; each is played against this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver import DRIVER_NAME
from csi_driver._proto.csi_pb2 import DEGRADED
from csi_driver.core.names import Names, spiffe_id
from tests.integration.node.world import Node, Request, Shown, failure_of, running_node
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import Response, TestCA, answer_of, roots_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOON = timedelta(seconds=1)


async def test_1_concurrent_publishes_are_never_answered_with_an_empty_volume(node: Node) -> None:
    """Failure: of two publishes at once, the second returns OK while the volume is empty.

    Here every call, at the moment it returns, has the whole volume; and one certificate serves them all.
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
async def test_2_a_full_file_system_never_costs_a_live_volume(node: Node) -> None:
    """Failure: a republish that hits ENOSPC unmounts and deletes the live volume.

    Here republishes and renewals in a full volume leave it as it is, say why, and heal when there is room.
    """
    node.script.renew_after = SOON
    pod = FakePod()
    request = await node.published(pod)
    filler = node.volume_dir(request) / "filler"
    _fill(filler)
    before, mounts = node.shown(request), node.mounts(node.kubelet.root)
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="NoSpace"), "a renewal without room")
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
    await until(lambda: node.shown(request).serial != before.serial, "healed")
    assert await node.health(request) == []


def _fill(path: Path) -> None:
    """Takes the last byte of the file system."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


async def test_3_unpublish_of_a_missing_target_is_fine(node: Node) -> None:
    """Failure: unpublish of a target that does not exist is an error, and the pod hangs in Terminating.

    Here it is OK, with the volume there or not, and the volume goes.
    """
    request = await node.published()
    if node.real_mounts:
        node.unmount(request)
        node.target(request).rmdir()
    else:
        node.target(request).unlink()
    await node.unpublish(request)
    node.assert_nothing_of(request)
    await node.unpublish(request)


async def test_4_a_truncated_record_stops_nothing(node: Node) -> None:
    """Failure: one truncated metadata file keeps the driver from starting.

    Here the driver starts, other volumes rotate on, the volume's pod keeps its files, and the kubelet's next look takes it
    up again without a new certificate.
    """
    pod, other = FakePod(), FakePod(name="other")
    request = await node.published(pod)
    node.script.renew_after = SOON
    neighbour = await node.published(other)
    shown, neighbours = node.shown(request), node.shown(neighbour)
    await node.driver.kill()
    record = node.volume_dir(request) / "record.json"
    record.write_bytes(record.read_bytes()[:-20])
    await node.driver.start()
    assert node.shown(request) == shown
    await node.publish(node.kubelet.publish_request(other))
    await until(lambda: node.shown(neighbour).serial != neighbours.serial, "the neighbour rotates")
    await node.publish(node.kubelet.publish_request(pod))
    assert node.shown(request) == shown
    assert await node.health(request) == []


_GARBAGE: dict[str, Callable[[Response], Response]] = {
    "text": lambda _: answer_of([b"not PEM, not DER"], [b"neither"]),
    "pem": lambda answer: answer_of([b"-----BEGIN CERTIFICATE-----"], roots_of(answer)),
    "empty": lambda _: Response(),
    "cut": lambda answer: answer_of([answer.chain[0][:-1]], roots_of(answer)),
    "long": lambda answer: answer_of([answer.chain[0] + b"\0"], roots_of(answer)),
    "roots": lambda answer: answer_of(answer.chain, [b""]),
}


@pytest.mark.parametrize("garbage", _GARBAGE)
async def test_5_an_answer_that_does_not_parse_is_an_error(node: Node, garbage: str) -> None:
    """Failure: a reply that is not PEM crashes the process.

    Here it fails that call or renewal alone, with a reason; the process stays, and the next good answer is taken.
    """
    await _refuses(node, _GARBAGE[garbage])


def _signed(
    ca: TestCA, answer: Response, *, own_key: bool = True, account: str = "shop", is_ca: bool = False
) -> Response:
    """The answer with another certificate of the same CA, which fits but for one thing."""
    key = x509.load_der_x509_certificate(answer.chain[0]).public_key()
    if not own_key:
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    names = Names.of([], [spiffe_id("cluster.local", "web", account)])
    leaf = ca.sign(key, names, timedelta(hours=1), ca=is_ca)
    return answer_of([leaf.public_bytes(Encoding.DER)], roots_of(answer))


_UNFIT: dict[str, Callable[[TestCA, Response], Response]] = {
    "wrong-key": lambda ca, answer: _signed(ca, answer, own_key=False),
    "other-account": lambda ca, answer: _signed(ca, answer, account="root"),
    "authority": lambda ca, answer: _signed(ca, answer, is_ca=True),
    "other-root": lambda _, answer: answer_of(answer.chain, [TestCA("another").der]),
}


@pytest.mark.parametrize("fault", ["expired", *_UNFIT])
async def test_6_a_certificate_that_does_not_fit_is_not_written(node: Node, fault: str) -> None:
    """Failure: an expired certificate, or one for another key, is written all the same.

    Here none gets to a pod, first or later: no volume is made of it, and a live one keeps what it has.
    """
    ca = node.authority.ca
    if fault == "expired":
        await _refuses(node, life=timedelta(seconds=-10))
    else:
        await _refuses(node, lambda answer: _UNFIT[fault](ca, answer))


async def _refuses(
    node: Node, tamper: Callable[[Response], Response] = lambda answer: answer, life: timedelta = timedelta(hours=1)
) -> None:
    """A first publish with such answers fails and leaves nothing; a live volume keeps its files; good answers are taken again."""
    good = node.script.tamper
    node.script.renew_after = SOON
    live = await node.published()
    before, pid = node.shown(live), node.driver.pid
    node.script.tamper, node.script.life = tamper, life
    request = node.request(FakePod(name="new"))
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "InvalidResponse")
    node.assert_nothing_of(request)
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="InvalidResponse"), "a failed renewal")
    assert node.shown(live) == before
    node.script.tamper, node.script.life = good, timedelta(hours=1)
    await node.publish(request)
    assert node.shown(request).names
    assert node.driver.pid == pid


@pytest.mark.root
@pytest.mark.peers("unshare")
async def test_7_pods_see_rotations_by_a_driver_that_was_started_again() -> None:
    """Failure: after a driver restart pods never see a rotation again, as the new driver writes to a tmpfs of its own.

    Here the driver lives in a mount namespace of its own, as its container does, and so does the pod, which no later mount
    reaches; drivers are killed, their namespaces with them, and the pod sees each rotation in the mount it has had from
    the beginning, read-only.
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
                await _make_due(node, request)
                await node.publish(node.kubelet.publish_request(pod))
                await until(lambda: Shown.at(target).serial not in seen, "the pod sees the rotation")
                seen.add(Shown.at(target).serial)
            assert Shown.at(target) == node.shown(request)
        await node.unpublish(request)
        node.assert_nothing_of(request)


async def _make_due(node: Node, request: Request) -> None:
    """Lets the volume's moment have come when the driver starts."""
    await node.driver.kill()
    record = node.record(request)
    (node.volume_dir(request) / "record.json").write_text(json.dumps(record | {"renew_at": record["issued_at"]}))
    await node.driver.start()


@contextlib.asynccontextmanager
async def _namespace() -> AsyncIterator[Path]:
    """A pod's view: the root folder of a process with a mount namespace that is a copy of ours as it is now."""
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


async def test_8_volumes_of_pods_that_are_gone_are_not_renewed(node: Node) -> None:
    """Failure: the certificate of a pod that no longer exists is renewed for ever.

    Here it is dropped with its key: at the next start, else when its renewal is due; the authority is not asked.
    """
    node.script.renew_after = timedelta(seconds=2)
    later, while_down = await node.published(), await node.published()
    await node.driver.kill()
    node.forget_pod(while_down)
    await node.driver.start()
    node.assert_nothing_of(while_down)
    node.forget_pod(later)
    await until(lambda: not node.volume_dir(later).exists(), "dropped when due")
    node.assert_nothing_of(later)
    assert node.script.calls == 2


@pytest.mark.root
async def test_9_the_tmpfs_is_small_private_and_the_drivers_own(node: Node) -> None:
    """Failure: one tmpfs for all pods, mode 1777, half of the memory, no noswap, nosuid, nodev, noexec, in a folder of /tmp
    that two drivers share.

    Here each volume has its own of one megabyte, which only root can enter, in the driver's folder of the kubelet's plugins.
    """
    first, second = await node.published(), await node.published()
    assert node.volumes == node.kubelet.root / "plugins" / DRIVER_NAME / "volumes"
    assert stat.S_IMODE(node.volumes.stat().st_mode) == 0o700
    devices = set()
    for request in (first, second):
        (mount,) = node.mounts(node.volume_dir(request))
        devices.add(mount.device)
        assert mount.fs_type == "tmpfs"
        assert {"nosuid", "nodev", "noexec"} <= mount.options
        assert {"size=1024k", "nr_inodes=128", "mode=700"} <= mount.super_options
        if _kernel() >= (6, 4):
            assert "noswap" in mount.super_options
        found = node.volume_dir(request).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o700, 0, 0)
    assert len(devices) == 2


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


async def test_10_no_token_in_any_record_or_log(node: Node) -> None:
    """Failure: live tokens are written into the volume's metadata, and were logged at the default verbosity.

    Here neither token nor key is in the record or in the log, which is written at debug level (see also the canary).
    """
    pod = FakePod()
    token = pod.token()
    node.script.renew_after = SOON
    request = await node.published(pod, token=token)
    before = node.shown(request)
    await until(lambda: node.shown(request).serial != before.serial, "a rotation")
    texts = [node.driver.log_text(), json.dumps(node.record(request))]
    lines = before.key.decode().splitlines()[1:-1] + node.shown(request).key.decode().splitlines()[1:-1]
    for secret in (token, *token.split("."), node.authority.token_file.read_text(), *lines):
        assert all(secret not in text for text in texts)
    assert token in node.script.tokens
