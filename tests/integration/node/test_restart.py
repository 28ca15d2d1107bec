"""A restarted driver knows its volumes and requests no new certificates."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from csi_driver._proto.csi_pb2 import DEGRADED
from tests.integration.node.world import Node, failure_of, make_due
from tests.support.kubelet import FakePod
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_QUARANTINED = "record quarantined; the volume keeps its files"


async def test_killed_driver_restores_its_volumes(node: Node) -> None:
    pod = FakePod()
    node.script.renew_after = timedelta(seconds=2)
    request = await node.published(pod)
    before, state = node.shown(request), node.state(request)
    node.script.renew_after = None
    await node.restart()
    assert node.state(request) == state
    # Tokens are only in memory, so a renewal that is due waits for the next republish.
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="TokenMissing"), "due without a token")
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "TokenMissing")
    assert "the kubelet sends a token when it republishes the volume" in message
    assert (node.script.calls, node.shown(request)) == (1, before)
    await node.publish(node.kubelet.publish_request(pod))
    await until(lambda: node.shown(request).serial != before.serial, "renewed")
    assert await node.health(request) == []


async def test_restart_of_driver_and_kubelet_reissues_nothing(node: Node) -> None:
    pods = [FakePod(name=f"shop-{number}") for number in range(20)]
    requests = [node.request(pod) for pod in pods]
    await asyncio.gather(*(node.publish(request) for request in requests))
    states, mounts = [node.state(request) for request in requests], node.mounts(node.kubelet.root)
    for _ in range(2):
        await node.restart()
        await asyncio.gather(*(node.publish(node.kubelet.publish_request(pod)) for pod in pods))
    assert [node.state(request) for request in requests] == states
    assert node.mounts(node.kubelet.root) == mounts
    assert node.script.calls == len(pods)
    await until(lambda: node.metric("certmount_node_volumes") == len(pods), "the metric")


async def test_sigterm_lets_calls_finish_and_leaves_the_files_of_pods(node: Node) -> None:
    node.script.delay_s = 1.0
    request = node.request()
    call = asyncio.ensure_future(node.publish(request))
    await until(lambda: node.script.calls, "the call is in progress")
    stopped = asyncio.ensure_future(node.driver.stop())
    await until(lambda: not node.kubelet.registration_socket.exists(), "the registration has ended")
    assert not call.done()
    await call
    assert await stopped == 0
    assert node.driver.events("stopped")
    shown = node.shown(request)
    await node.driver.start()
    await node.publish(request)
    assert node.shown(request) == shown
    assert node.script.calls == 1
    await node.unpublish(request)
    node.assert_nothing_of(request)


async def test_orphaned_volumes_are_removed_at_start(node: Node) -> None:
    gone, stays = await node.published(), await node.published()
    await node.driver.kill()
    node.forget_pod(gone)
    await node.driver.start()
    node.assert_nothing_of(gone)
    assert node.shown(stays).names
    assert (await node.health(stays), node.script.calls) == ([], 2)


@pytest.mark.root
async def test_volumes_with_damaged_records_are_adopted_or_unpublished(node: Node) -> None:
    """Failure of other drivers: a truncated metadata file prevents the start."""
    damages = ("truncated", "empty", "missing", "garbage", "another-volumes")
    pods = {damage: FakePod(name=damage) for damage in damages}
    options: dict[str, Any] = {"attributes": {"name": "shop.example.com"}, "fs_group": "2000"}
    requests = {damage: await node.published(pod, **options) for damage, pod in pods.items()}
    shown = {damage: node.shown(request) for damage, request in requests.items()}
    bystander, removed = await node.published(), await node.published()
    neighbour = node.shown(bystander)
    await make_due(node, bystander)
    due = node.record(bystander)["renew_at"]
    for damage, request in requests.items():
        path = node.volume_dir(request) / "record.json"
        text, other = path.read_bytes(), (node.volume_dir(bystander) / "record.json").read_bytes()
        content = {"truncated": text[: len(text) // 2], "empty": b"", "garbage": b"\0\xff{", "another-volumes": other}
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(content[damage])
    (node.volume_dir(removed) / "record.json").write_bytes(b"{")
    logged = len(node.driver.events(_QUARANTINED))
    await node.driver.start()
    assert len(node.driver.events(_QUARANTINED)) == logged + len(damages) + 1
    await until(lambda: node.metric("certmount_node_records_quarantined_total") == len(damages) + 1, "the metric")
    await node.unpublish(removed)
    node.assert_nothing_of(removed)
    for damage, request in requests.items():
        assert node.shown(request) == shown[damage]
        await node.publish(node.kubelet.publish_request(pods[damage], **options))
        assert node.shown(request) == shown[damage]
        record = node.record(request)
        assert (record["pod_uid"], record["mount_group"]) == (pods[damage].uid, 2000)
    assert node.script.calls == 7
    await node.publish(bystander)
    await until(lambda: node.shown(bystander).serial != neighbour.serial, "the other volume is renewed")
    await until(lambda: node.record(bystander)["renew_at"] != due, "the record of the renewal")
    await node.restart()
    assert [await node.health(request) for request in (*requests.values(), bystander)] == [[]] * 6
    assert node.script.calls == 8


async def test_volume_of_a_newer_driver_keeps_its_files(node: Node) -> None:
    """After a downgrade, its record can have unknown attributes."""
    request = await node.published()
    shown = node.shown(request)
    await node.driver.kill()
    record = node.record(request)
    (node.volume_dir(request) / "record.json").write_text(json.dumps(record | {"attributes": {"keystore": "jks"}}))
    await node.driver.start()
    (line,) = node.driver.events("volume not restored")
    assert "keystore" in line["error"]
    assert line["pod"] == f"{record['pod_namespace']}/{record['pod_name']}"
    # Nothing renews it, so an alert must fire.
    await until(lambda: node.metric("certmount_node_records_quarantined_total") == 1, "the metric")
    republish = node.kubelet.publish_request(FakePod(uid=record["pod_uid"]), {"keystore": "jks"})
    await node.publish(republish)
    assert node.shown(request) == shown
    assert node.script.calls == 1


@pytest.mark.root
async def test_adopted_volume_with_other_names_is_renewed(node: Node) -> None:
    pod = FakePod()
    request = await node.published(pod, {"name": "old.example.com"})
    before = node.shown(request)
    await node.driver.kill()
    (node.volume_dir(request) / "record.json").unlink()
    await node.driver.start()
    await node.publish(node.kubelet.publish_request(pod, {"name": "new.example.com"}))
    await until(lambda: node.shown(request).serial != before.serial, "renewed")
    assert "new.example.com" in node.shown(request).names


@pytest.mark.root
async def test_volume_that_was_never_bound_is_removed_at_start(node: Node) -> None:
    """The driver was killed before the bind. A publish creates the volume again."""
    request = await node.published()
    await node.driver.kill()
    node.unmount(request)
    node.target(request).rmdir()
    (node.volume_dir(request) / "record.json").unlink()
    await node.driver.start()
    node.assert_nothing_of(request)
    await node.publish(request)
    assert node.shown(request).names


@pytest.mark.root  # a directory instead of a mount can be bound, so it stays
async def test_kill_while_the_issuer_works_leaves_nothing(node: Node) -> None:
    """The tmpfs is mounted meanwhile, and no pod can see it."""
    request = node.request()
    node.script.gate = asyncio.Event()
    call = asyncio.ensure_future(failure_of(node.publish(request)))
    await until(lambda: node.script.calls and (node.volume_dir(request) / "files").is_dir(), "the tmpfs is mounted")
    await node.driver.kill()
    await call
    await node.driver.start()
    node.assert_nothing_of(request)
    node.script.gate = None
    await node.publish(request)
    assert node.shown(request).names


async def test_kill_at_any_time_of_a_publish_is_repaired(node: Node) -> None:
    for milliseconds in (1, 2, 3, 4, 6, 9, 14):
        request = node.request()
        call = asyncio.ensure_future(node.publish(request))
        await asyncio.sleep(milliseconds / 1000)
        await node.driver.kill()
        await node.driver.start()
        await asyncio.wait([call])
        call.exception()
        await node.publish(request)
        assert node.shown(request).names
        assert len(node.mounts(request.target_path)) == int(node.real_mounts)


@pytest.mark.root
async def test_volumes_are_created_again_after_a_reboot(node: Node) -> None:
    """A reboot leaves directories that are not mounted."""
    request = await node.published()
    await node.driver.kill()
    for mount in reversed(node.mounts(node.kubelet.root)):
        node.unmount_path(mount.point)
    await node.driver.start()
    assert list(node.volumes.iterdir()) == []
    await node.publish(request)
    assert node.shown(request).names
    assert node.script.calls == 2


async def test_stale_sockets_are_replaced(node: Node) -> None:
    await node.driver.kill()
    for socket in (node.kubelet.socket, node.kubelet.registration_socket):
        socket.unlink(missing_ok=True)
        socket.write_text("not a socket")
    await node.driver.start()
    assert (await node.kubelet.register()).endpoint == str(node.kubelet.socket)
    await node.published()


async def test_nothing_is_removed_while_the_pods_directory_is_missing(node: Node) -> None:
    """If in doubt, a pod exists."""
    request = await node.published()
    await node.driver.kill()
    pods, elsewhere = node.kubelet.root / "pods", node.kubelet.root / "elsewhere"
    pods.rename(elsewhere)
    try:
        await node.driver.start()
        assert node.volume_dir(request).exists()
    finally:
        elsewhere.rename(pods)
    await node.restart()
    assert node.shown(request).names
    assert node.script.calls == 1
