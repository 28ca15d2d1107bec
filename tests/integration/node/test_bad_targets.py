"""Targets, file systems and disks that can't hold a volume: a clear error, and what is not ours stays untouched."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import grpc
import pytest

from csi_driver.host import syscalls
from tests.integration.node.bad_input import FAILED, INVALID, KUBELET, refuses
from tests.integration.node.world import Node, failure_of
from tests.support.kubelet import FakePod

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
    assert (failure.code, failure.reason) == (FAILED, "InvalidTargetPath")
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
    assert (failure.code, failure.reason) == (FAILED, "InvalidTargetPath")
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
            "InvalidKubeletDirectory",
            "set --kubelet-dir to /var/lib/other",
        ),
        ("/somewhere/else", FAILED, "InvalidKubeletDirectory", "--kubelet-dir"),
        ("{root}/pods/another-pod/volumes/x/mount", FAILED, "InvalidTargetPath", "its own pod's folder only"),
        ("{root}/pods/{uid}/volumes/none/x/mount", FAILED, "InvalidTargetPath", "does not exist"),
        ("{root}/pods/{uid}/volumes/../../mount", INVALID, "InvalidRequest", "target_path"),
        ("{root}/pods/{uid}/volumes/x\0/mount", INVALID, "InvalidRequest", "target_path"),
        ("relative/path", INVALID, "InvalidRequest", "is not an absolute path"),
        ("{root}/pods/{uid}/volumes/" + "long/" * 1000 + "mount", INVALID, "InvalidRequest", "target_path"),
        ("{root}/pods/{uid}/volumes/" + "n" * 300 + "/mount", FAILED, "InvalidTargetPath", "too long"),
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
        await refuses(node, request, grpc.StatusCode.RESOURCE_EXHAUSTED, "NoSpace", "No space left on device")
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
async def test_a_full_volume(node: Node) -> None:
    """The volume's own file system can't hold the files (a leftover of this boot fills it): nothing stays of it."""
    request = node.request()
    folder = node.volume_dir(request)
    folder.mkdir()
    syscalls.mount("certmount", str(folder), "tmpfs", 0, "size=64k,mode=0700")
    (folder / "filler").write_bytes(b"x" * 65536)
    words = ("No space left on device", "fewer names or a smaller key make room")
    await refuses(node, request, grpc.StatusCode.RESOURCE_EXHAUSTED, "NoSpace", *words)
    await node.publish(request)
    assert node.shown(request).names


# A volume that its pod has before it.
