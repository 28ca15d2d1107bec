"""Unpublish always succeeds and leaves nothing."""

from __future__ import annotations

import asyncio
import shutil

import grpc
import pytest

from csi_driver._proto import csi_pb2
from tests.integration.node.world import Node, failure_of
from tests.support.kubelet import FakePod
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_unpublish_removes_everything_and_can_be_repeated(node: Node) -> None:
    request = await node.published()
    await until(lambda: node.metric("certmount_node_volumes") == 1, "the metric")
    await node.unpublish(request)
    node.assert_nothing_of(request)
    # A page of metrics is used again for some time.
    await until(lambda: node.metric("certmount_node_volumes") == 0, "the volume is not counted")
    await node.unpublish(request)
    await asyncio.gather(*(node.unpublish(request) for _ in range(10)))
    node.assert_nothing_of(request)


async def test_unpublish_of_an_unknown_volume_succeeds(node: Node) -> None:
    request = node.request()
    await node.unpublish(request)
    request.target_path = f"{node.kubelet.root}/pods/no-such-pod/volumes/kubernetes.io~csi/tls/mount"
    await node.unpublish(request)
    request.target_path, request.volume_id = "/nowhere/at/all", "../../../etc"
    await node.unpublish(request)


async def test_unpublish_of_a_missing_target_succeeds(node: Node) -> None:
    request = await node.published()
    if node.real_mounts:
        node.unmount(request)
        node.target(request).rmdir()
    else:
        node.target(request).unlink()
    await node.unpublish(request)
    node.assert_nothing_of(request)


@pytest.mark.parametrize("state", ["unmounted", "pod-gone", "tmpfs-gone", "directory-gone", "files-gone"])
@pytest.mark.root
async def test_unpublish_of_a_partial_volume_succeeds(node: Node, state: str) -> None:
    request = await node.published()
    if state in ("unmounted", "pod-gone"):
        node.unmount(request)
    if state == "pod-gone":
        shutil.rmtree(node.pod_dir(request))
    if state == "files-gone":
        shutil.rmtree(node.volume_dir(request) / "files")
    if state in ("tmpfs-gone", "directory-gone"):
        node.unmount_path(str(node.volume_dir(request)))
    if state == "directory-gone":
        node.volume_dir(request).rmdir()
    await node.unpublish(request)
    node.assert_nothing_of(request)


async def test_unpublish_keeps_foreign_files(node: Node) -> None:
    request = node.request()
    target = node.target(request)
    target.mkdir()
    (target / "precious").touch()
    await node.unpublish(request)
    assert (target / "precious").exists()
    shutil.rmtree(target)
    target.touch()
    await node.unpublish(request)
    assert target.is_file()
    target.unlink()


async def test_concurrent_publish_and_unpublish_leave_no_partial_volume(node: Node) -> None:
    for _ in range(10):
        request = node.request()
        calls = (node.publish(request), node.unpublish(request), node.publish(request), node.unpublish(request))
        await asyncio.gather(*calls)
        if node.target(request).exists():
            assert node.shown(request).names
        await node.unpublish(request)
        node.assert_nothing_of(request)


async def test_unpublish_does_not_wait_for_other_volumes(node: Node) -> None:
    done = await node.published()
    node.script.delay_s = 5.0
    hanging = asyncio.ensure_future(node.publish(node.request(FakePod(name="slow")), timeout=3.0))
    await node.unpublish(done)
    assert not hanging.done()
    node.assert_nothing_of(done)
    hanging.cancel()
    await asyncio.wait([hanging])


@pytest.mark.parametrize("missing", ["volume_id", "target_path"])
async def test_missing_field_is_rejected_by_name(node: Node, missing: str) -> None:
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="csi-1", target_path="/x")
    request.ClearField(missing)  # type: ignore[arg-type]  # one of the two field names
    failure = await failure_of(node.stub.NodeUnpublishVolume(request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidRequest")
    assert f"{missing}: is empty" in failure.text


@pytest.mark.parametrize(
    "target",
    ["relative", "{pods}/../x", "{pods}/nul\0byte", "{pods}/" + "long/" * 999, "{pods}/" + "n" * 256, "{pods}/\u202e"],
    ids=["relative", "dots", "nul", "long-path", "long-name", "unicode"],
)
async def test_unpublish_of_an_invalid_target_succeeds(node: Node, target: str) -> None:
    """No volume can be there, and an error would keep the pod in Terminating."""
    request = await node.published()
    target = target.format(pods=node.kubelet.root / "pods")
    for volume_id in (request.volume_id, "csi-unknown"):
        await node.stub.NodeUnpublishVolume(csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=target))
    assert node.shown(request).names
