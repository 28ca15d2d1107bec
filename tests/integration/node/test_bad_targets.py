"""Target paths and file systems that cannot hold a volume. The driver does not touch foreign files and mounts."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import grpc
import pytest

from csi_driver.host import syscalls
from tests.integration.node.test_bad_input import FAILED, INVALID, KUBELET, rejects
from tests.integration.node.world import Node, failure_of
from tests.support.kubelet import FakePod

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_target_that_is_not_a_directory_is_rejected(node: Node) -> None:
    request = node.request()
    target = node.target(request)
    target.write_text("precious")
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (FAILED, "InvalidTargetPath")
    assert f"{target} is not a directory; remove it from the node" in failure.text
    assert target.read_text() == "precious"
    assert not node.volume_dir(request).exists()
    assert (node.mounts(node.kubelet.root), node.script.calls) == ([], 0)
    target.unlink()
    await node.publish(request)
    assert node.shown(request).names


@pytest.mark.root
async def test_target_with_a_foreign_mount_is_rejected(node: Node) -> None:
    request = node.request()
    target = node.target(request)
    target.mkdir()
    syscalls.mount("foreign", str(target), "tmpfs", 0, "size=64k")
    failure = await failure_of(node.publish(request))
    assert (failure.code, failure.reason) == (FAILED, "InvalidTargetPath")
    assert f"umount {target}" in failure.text
    assert [mount.source for mount in node.mounts(node.kubelet.root)] == ["foreign"]
    assert not node.volume_dir(request).exists()
    node.unmount(request)
    await node.publish(request)
    assert node.shown(request).names


@pytest.mark.parametrize(
    "target, code, reason, words",
    [
        ("/var/lib/other/pods/{uid}/volumes/x", FAILED, "InvalidKubeletDirectory", "--kubelet-dir to /var/lib/other"),
        ("{root}/pods/another/volumes/x/m", FAILED, "InvalidTargetPath", "only in the directory of its own pod"),
        ("{root}/pods/{uid}/volumes/../../mount", INVALID, "InvalidRequest", "target_path"),
        ("{root}/pods/{uid}/volumes/x\0/mount", INVALID, "InvalidRequest", "target_path"),
        ("{root}/pods/{uid}/volumes/" + "long/" * 1000 + "mount", INVALID, "InvalidRequest", "target_path"),
        ("{root}/pods/{uid}/volumes/" + "n" * 300 + "/mount", FAILED, "InvalidTargetPath", "too long"),
    ],
    ids=["other-root", "other-pod", "dots", "nul", "long-path", "long-name"],
)
async def test_wrong_path_is_rejected(node: Node, target: str, code: grpc.StatusCode, reason: str, words: str) -> None:
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


def _fill(directory: Path) -> None:
    """Use all inodes of the file system."""
    try:
        for number in range(1_000_000):
            (directory / str(number)).touch()
    except OSError as error:
        assert error.errno == errno.ENOSPC


@pytest.mark.root
async def test_full_kubelet_file_system_affects_only_new_volumes(node: Node) -> None:
    live = await node.published()
    filler = node.kubelet.root / "filler"
    filler.mkdir()
    request = node.request()
    try:
        _fill(filler)
        await rejects(node, request, grpc.StatusCode.RESOURCE_EXHAUSTED, "NoSpace", "No space left on device")
        before, pod = node.shown(live), live.volume_context[f"{KUBELET}pod.uid"]
        await node.publish(node.kubelet.publish_request(FakePod(uid=pod)))
        await node.restart()
        await node.publish(node.kubelet.publish_request(FakePod(uid=pod)))
        assert node.shown(live) == before
    finally:
        shutil.rmtree(filler)
    await node.publish(request)
    assert node.shown(request).names


@pytest.mark.root
async def test_full_volume_is_removed(node: Node) -> None:
    request = node.request()
    directory = node.volume_dir(request)
    directory.mkdir()
    syscalls.mount("certmount", str(directory), "tmpfs", 0, "size=64k,mode=0700")
    (directory / "filler").write_bytes(b"x" * 65536)
    words = ("No space left on device", "use fewer names or a smaller key")
    await rejects(node, request, grpc.StatusCode.RESOURCE_EXHAUSTED, "NoSpace", *words)
    await node.publish(request)
    assert node.shown(request).names
