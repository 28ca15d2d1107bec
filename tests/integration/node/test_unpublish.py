"""Unpublish of anything is fine, and nothing stays."""

from __future__ import annotations

import asyncio
import shutil

import grpc
import pytest

from csi_driver._proto import csi_pb2
from tests.integration.node.world import Node, failure_of
from tests.support.kubelet import FakePod

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_volume_goes_with_mount_folder_and_record(node: Node) -> None:
    """After unpublish nothing of the volume is on the node, and its key is not in the metrics of live volumes."""
    request = await node.published()
    assert node.metric("certmount_node_volumes") == 1
    await node.unpublish(request)
    node.assert_nothing_of(request)
    assert node.metric("certmount_node_volumes") == 0


async def test_again_is_fine(node: Node) -> None:
    """The kubelet repeats what it got no answer for."""
    request = await node.published()
    for _ in range(3):
        await node.unpublish(request)
    await asyncio.gather(*(node.unpublish(request) for _ in range(10)))
    node.assert_nothing_of(request)


async def test_the_unknown_is_fine(node: Node) -> None:
    """A volume that was never here, a target that does not exist, also not its folder."""
    request = node.request()
    await node.unpublish(request)
    request.target_path = f"{node.kubelet.root}/pods/no-such-pod/volumes/kubernetes.io~csi/tls/mount"
    await node.unpublish(request)
    request.target_path, request.volume_id = "/nowhere/at/all", "../../../etc"
    await node.unpublish(request)


@pytest.mark.parametrize("half", ["unmounted", "target-gone", "pod-gone", "tmpfs-gone", "folder-gone", "files-gone"])
@pytest.mark.root
async def test_the_half_gone_is_fine(node: Node, half: str) -> None:
    """Whatever is missing already, the rest goes."""
    request = await node.published()
    if half in ("unmounted", "target-gone", "pod-gone"):
        node.unmount(request)
    if half == "target-gone":
        node.target(request).rmdir()
    if half == "pod-gone":
        shutil.rmtree(node.pod_dir(request))
    if half == "files-gone":
        shutil.rmtree(node.volume_dir(request) / "files")
    if half in ("tmpfs-gone", "folder-gone"):
        node.unmount_path(str(node.volume_dir(request)))
    if half == "folder-gone":
        node.volume_dir(request).rmdir()
    await node.unpublish(request)
    node.assert_nothing_of(request)


async def test_what_others_put_at_the_target_stays(node: Node) -> None:
    """Unpublish removes what publish made, and nothing of anybody else."""
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


async def test_publish_and_unpublish_at_once(node: Node) -> None:
    """Calls of one volume take turns: in the end it is whole or gone, never half."""
    for _ in range(10):
        request = node.request()
        calls = (node.publish(request), node.unpublish(request), node.publish(request), node.unpublish(request))
        await asyncio.gather(*calls)
        if node.target(request).exists():
            assert node.shown(request).names
        await node.unpublish(request)
        node.assert_nothing_of(request)


async def test_unpublish_waits_for_nobody_else(node: Node) -> None:
    """A volume whose publish hangs at the authority does not hold up the end of another pod."""
    done = await node.published()
    node.script.delay_s = 5.0
    hanging = asyncio.ensure_future(node.publish(node.request(FakePod(name="slow")), timeout=3.0))
    await node.unpublish(done)
    assert not hanging.done()
    node.assert_nothing_of(done)
    hanging.cancel()
    await asyncio.wait([hanging])


@pytest.mark.parametrize("missing", ["volume_id", "target_path"])
async def test_what_is_required_is_named(node: Node, missing: str) -> None:
    """Only a call that does not say what it is about is refused."""
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
async def test_a_strange_target_is_fine(node: Node, target: str) -> None:
    """Nothing of ours can be there, so there is nothing to do: an error would hold the pod in Terminating."""
    request = await node.published()
    target = target.format(pods=node.kubelet.root / "pods")
    for volume_id in (request.volume_id, "csi-unknown"):
        await node.stub.NodeUnpublishVolume(csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=target))
    assert node.shown(request).names
