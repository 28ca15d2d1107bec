"""A driver that ends, however it ends, is followed by one that knows its volumes and re-issues nothing."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from csi_driver._proto.csi_pb2 import DEGRADED
from tests.integration.node.world import Node
from tests.support.kubelet import FakePod
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_QUARANTINED = "record quarantined; the volume stays as it is"


async def test_killed_and_started_again(node: Node) -> None:
    """SIGKILL and a new process: 0 re-issued, nothing written, and the pod sees the next rotation in the mount it has."""
    pod = FakePod()
    node.script.renew_after = timedelta(seconds=2)
    request = await node.published(pod)
    before, state = node.shown(request), node.state(request)
    node.script.renew_after = None
    await node.restart()
    assert node.state(request) == state
    # The token was in memory only, so a renewal that falls due waits for the kubelet's next look.
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="TokenMissing"), "due without a token")
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "TokenMissing")
    assert "the kubelet sends a token when it republishes the volume" in message
    assert (node.script.calls, node.shown(request)) == (1, before)
    await node.publish(node.kubelet.publish_request(pod))
    await until(lambda: node.shown(request).serial != before.serial, "renewed")
    assert await node.health(request) == []


async def test_many_volumes_after_a_kubelet_restart(node: Node) -> None:
    """Driver killed, then all volumes published again at once: 0 re-issued, one mount each, nothing written."""
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
    assert node.metric("certmount_node_volumes") == len(pods)


async def test_a_graceful_stop_lets_a_call_end(node: Node) -> None:
    """On SIGTERM the registration goes first, a call under way still gets its answer, and the exit status is 0."""
    node.script.delay_s = 1.0
    request = node.request()
    call = asyncio.ensure_future(node.publish(request))
    await until(lambda: node.script.calls, "the call is under way")
    stopped = asyncio.ensure_future(node.driver.stop())
    await until(lambda: not node.kubelet.registration_socket.exists(), "the registration is gone")
    assert not call.done()
    await call
    assert await stopped == 0
    assert node.driver.events("stopped")
    shown = node.shown(request)
    await node.driver.start()
    await node.publish(request)
    assert node.shown(request) == shown
    assert node.script.calls == 1


async def test_a_stop_while_idle_leaves_the_pods_alone(node: Node) -> None:
    """A stopped driver takes nothing from the pods; volumes that are unpublished meanwhile are so after the start."""
    requests = [await node.published() for _ in range(2)]
    shown = [node.shown(request) for request in requests]
    assert await node.driver.stop() == 0
    assert [node.shown(request) for request in requests] == shown
    assert not node.kubelet.registration_socket.exists()
    await node.driver.start()
    await node.unpublish(requests[0])
    node.assert_nothing_of(requests[0])
    assert node.shown(requests[1]) == shown[1]


async def test_orphans_are_dropped_at_the_start(node: Node) -> None:
    """A pod that vanished while no driver ran leaves no key behind; its neighbours stay."""
    gone, stays = await node.published(), await node.published()
    await node.driver.kill()
    node.forget_pod(gone)
    await node.driver.start()
    node.assert_nothing_of(gone)
    assert node.shown(stays).names
    assert (await node.health(stays), node.script.calls) == ([], 2)


@pytest.mark.root
async def test_damaged_records_cost_nothing(node: Node) -> None:
    """Records that can't be used stop neither the start nor the pods; the kubelet's next look takes the volumes up again."""
    damages = ("truncated", "empty", "missing", "garbage", "another-volumes")
    pods = {damage: FakePod(name=damage) for damage in damages}
    wanted: dict[str, Any] = {"attributes": {"name": "shop.example.com"}, "fs_group": "2000"}
    requests = {damage: await node.published(pod, **wanted) for damage, pod in pods.items()}
    shown = {damage: node.shown(request) for damage, request in requests.items()}
    bystander = await node.published()
    await node.driver.kill()
    for damage, request in requests.items():
        path = node.volume_dir(request) / "record.json"
        text, other = path.read_bytes(), (node.volume_dir(bystander) / "record.json").read_bytes()
        content = {"truncated": text[: len(text) // 2], "empty": b"", "garbage": b"\0\xff{", "another-volumes": other}
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(content[damage])
    logged = len(node.driver.events(_QUARANTINED))
    await node.driver.start()
    assert len(node.driver.events(_QUARANTINED)) == logged + len(damages)
    assert node.metric("certmount_node_records_quarantined_total") == len(damages)
    for damage, request in requests.items():
        assert node.shown(request) == shown[damage]
        await node.publish(node.kubelet.publish_request(pods[damage], **wanted))
        assert node.shown(request) == shown[damage]
        record = node.record(request)
        assert (record["pod_uid"], record["mount_group"]) == (pods[damage].uid, 2000)
    await node.restart()
    assert [await node.health(request) for request in (*requests.values(), bystander)] == [[]] * 6
    assert node.script.calls == 6


async def test_a_record_of_a_driver_that_knew_more_attributes(node: Node) -> None:
    """After a downgrade a record may hold what this driver can't read: the pod keeps its files, and its volume ends well."""
    request = await node.published()
    shown = node.shown(request)
    await node.driver.kill()
    record = node.record(request)
    (node.volume_dir(request) / "record.json").write_text(json.dumps(record | {"attributes": {"keystore": "jks"}}))
    await node.driver.start()
    assert any("keystore" in line["error"] for line in node.driver.events("volume not restored"))
    republish = node.kubelet.publish_request(FakePod(uid=record["pod_uid"]), {"keystore": "jks"})
    await node.publish(republish)
    assert node.shown(request) == shown
    assert node.script.calls == 1


@pytest.mark.root
async def test_a_damaged_volume_is_unpublished_like_any(node: Node) -> None:
    """A pod can end while its record is unreadable: nothing stays."""
    request = await node.published()
    await node.driver.kill()
    (node.volume_dir(request) / "record.json").write_bytes(b"{")
    await node.driver.start()
    await node.unpublish(request)
    node.assert_nothing_of(request)


@pytest.mark.root
async def test_a_damaged_record_with_a_certificate_of_other_names_is_renewed(node: Node) -> None:
    """What is adopted is judged as if the authority had just sent it; where it does not fit the pod, it is renewed in place."""
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
async def test_a_half_made_volume_of_a_killed_driver_is_dropped(node: Node) -> None:
    """Killed between its tmpfs and the bind: no pod has seen it, so it goes at the start; a publish makes it anew."""
    request = await node.published()
    await node.driver.kill()
    node.unmount(request)
    node.target(request).rmdir()
    (node.volume_dir(request) / "record.json").unlink()
    await node.driver.start()
    node.assert_nothing_of(request)
    await node.publish(request)
    assert node.shown(request).names


async def test_killed_at_any_moment_of_a_publish(node: Node) -> None:
    """Whenever the driver is killed, the next one starts, and the kubelet's retry ends with one whole volume."""
    for milliseconds in (1, 2, 3, 4, 6, 9, 14):
        request = node.request()
        call = asyncio.ensure_future(node.publish(request))
        await asyncio.sleep(milliseconds / 1000)  # the moment is the point
        await node.driver.kill()
        await node.driver.start()
        await asyncio.wait([call])
        call.exception()
        await node.publish(request)
        assert node.shown(request).names
        assert len(node.mounts(request.target_path)) == int(node.real_mounts)


@pytest.mark.root
async def test_after_a_reboot_everything_is_made_anew(node: Node) -> None:
    """A reboot drops the tmpfs and leaves folders: they are no volumes, and the kubelet's calls find a clean node."""
    request = await node.published()
    await node.driver.kill()
    for mount in reversed(node.mounts(node.kubelet.root)):
        node.unmount_path(mount.point)
    await node.driver.start()
    assert list(node.volumes.iterdir()) == []
    await node.publish(request)
    assert node.shown(request).names
    assert node.script.calls == 2


async def test_stale_sockets_do_not_stop_a_start(node: Node) -> None:
    """A killed driver leaves its sockets; even other things in their place are taken over."""
    await node.driver.kill()
    for socket in (node.kubelet.socket, node.kubelet.registration_socket):
        socket.unlink(missing_ok=True)
        socket.write_text("not a socket")
    await node.driver.start()
    assert (await node.kubelet.register()).endpoint == str(node.kubelet.socket)
    await node.published()


async def test_the_kubelets_folder_of_pods_may_be_missing(node: Node) -> None:
    """In doubt a pod lives: where no folder of pods is seen at all, nothing is dropped at a start."""
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
