"""Where a volume may be mounted, and whether the kubelet's folder is the right one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.host.target_paths import check_kubelet_dir, check_target
from tests.unit.host.samples import POD_UID


@pytest.fixture
def kubelet(tmp_path: Path) -> Path:
    root = tmp_path / "kubelet"
    (root / "plugins_registry").mkdir(parents=True)
    (root / "pods" / POD_UID / "volumes" / "kubernetes.io~csi" / "tls").mkdir(parents=True)
    return root


@pytest.fixture
def target(kubelet: Path) -> Path:
    return kubelet / "pods" / POD_UID / "volumes" / "kubernetes.io~csi" / "tls" / "mount"


@pytest.fixture(scope="module")
def lasting_kubelet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kubelet")
    (root / "pods" / POD_UID / "volumes" / "tls").mkdir(parents=True)
    (root / "pods" / "other" / "volumes" / "tls").mkdir(parents=True)
    return root


def refusal(kubelet_dir: Path, target: object, pod_uid: str = POD_UID) -> CertmountError:
    with pytest.raises(CertmountError) as caught:
        check_target(kubelet_dir, str(target), pod_uid)
    return caught.value


def test_takes_the_kubelets_target_made_or_not(kubelet: Path, target: Path) -> None:
    """The kubelet makes the parent only; a target that is there already is one that was published before."""
    assert check_target(kubelet, str(target), POD_UID) == target
    target.mkdir()
    assert check_target(kubelet, str(target), POD_UID) == target


def test_a_file_at_the_target_is_named(kubelet: Path, target: Path) -> None:
    """The message says what is there, where, and what to do; the file stays."""
    target.write_text("mine")
    error = refusal(kubelet, target)
    assert error.reason is Reason.INVALID_TARGET_PATH
    assert str(error) == (
        f"InvalidTargetPath: target_path: a file is at {target}; remove it from the node; the kubelet then tries again"
    )
    assert target.read_text() == "mine"


@pytest.mark.parametrize("leads_to", ["/etc", "/nowhere", "."])
def test_a_symbolic_link_at_the_target_is_refused(kubelet: Path, target: Path, leads_to: str) -> None:
    """A link is refused wherever it leads, also to a folder, and is not followed."""
    target.symlink_to(leads_to)
    error = refusal(kubelet, target)
    assert error.reason is Reason.INVALID_TARGET_PATH
    assert "a symbolic link is at" in str(error)


def test_a_pipe_at_the_target_is_refused(kubelet: Path, target: Path) -> None:
    """Anything but a folder is."""
    os.mkfifo(target)
    assert "something other than a folder" in str(refusal(kubelet, target))


def test_the_link_that_stands_in_for_a_mount_is_taken(kubelet: Path, target: Path) -> None:
    """Without root a published target is a link into the driver's own folder, and is published again as such."""
    target.symlink_to(kubelet / "plugins" / "csi.certmount.dev" / "volumes" / "x" / "files")
    assert check_target(kubelet, str(target), POD_UID) == target


@pytest.mark.parametrize("text", ["", "mount", "../mount", "{t}/", "{t}/../mount", "{t}/.", "/{t}", "{t}\0", "{t}//x"])
def test_a_path_that_is_not_plain_is_refused(kubelet: Path, target: Path, text: str) -> None:
    """Relative, with dots, doubled or trailing slashes, or a zero byte: the request must change."""
    error = refusal(kubelet, text.format(t=target))
    assert error.reason is Reason.INVALID_REQUEST
    assert "target_path" in str(error)


@pytest.mark.parametrize("uid", ["", ".", "..", "a/b", "../../etc", "a\0", "a\n", "x" * 129])
def test_a_pod_uid_that_is_a_path_is_refused(kubelet: Path, target: Path, uid: str) -> None:
    """The pod's UID becomes a part of a path, so it may be nothing else."""
    assert refusal(kubelet, target, uid).reason is Reason.INVALID_REQUEST


def test_another_kubelets_root_is_named_with_the_option(kubelet: Path, target: Path) -> None:
    """Distributions differ in the kubelet's root: one line names the option, both paths and the value to set."""
    other = f"/var/lib/k0s/kubelet/pods/{POD_UID}/volumes/kubernetes.io~csi/tls/mount"
    error = refusal(kubelet, other)
    assert error.reason is Reason.INVALID_KUBELET_DIRECTORY
    for words in ("--kubelet-dir", str(kubelet), other, "set --kubelet-dir to /var/lib/k0s/kubelet,"):
        assert words in str(error)
    assert "--root-dir" in str(refusal(kubelet, "/mnt/x"))
    assert refusal(kubelet, f"{kubelet}-2/pods/{POD_UID}/volumes/x").reason is Reason.INVALID_KUBELET_DIRECTORY
    assert refusal(Path("/var/lib/kubelet"), target).reason is Reason.INVALID_KUBELET_DIRECTORY


def test_another_pods_folder_is_refused(kubelet: Path, target: Path) -> None:
    """A volume is mounted for the pod that the request is about, nowhere else below the kubelet's root."""
    for path in (target, kubelet / "plugins" / "x", kubelet / "pods" / "uid" / "volumes"):
        assert refusal(kubelet, path, "uid").reason is Reason.INVALID_TARGET_PATH


def test_a_missing_parent_is_explained(kubelet: Path, target: Path) -> None:
    """The kubelet makes it, so where it is missing the driver sees another folder than the kubelet does."""
    target.parent.rmdir()
    error = refusal(kubelet, target)
    assert error.reason is Reason.INVALID_TARGET_PATH
    assert "mounted at the same path" in str(error)


def test_a_name_too_long_for_the_kernel_is_refused(kubelet: Path, target: Path) -> None:
    """The kernel's own refusal is told like any other."""
    assert refusal(kubelet, target.with_name("x" * 300)).reason is Reason.INVALID_TARGET_PATH


@given(
    parts=st.lists(st.sampled_from(["..", ".", "", "pods", POD_UID, "volumes", "tls", "other"]) | st.text(max_size=9))
)
def test_no_text_leaves_the_pods_folder(lasting_kubelet: Path, parts: list[str]) -> None:
    """Whatever the target is, it is refused or lies in the pod's own folder of volumes, with no dots to leave it."""
    volumes = lasting_kubelet / "pods" / POD_UID / "volumes"
    for target in ("/".join(parts), "/".join([str(lasting_kubelet), *parts]), "/".join([str(volumes), *parts])):
        try:
            path = check_target(lasting_kubelet, target, POD_UID)
        except CertmountError:
            continue
        assert path.resolve().is_relative_to(volumes.resolve())
        assert path != volumes


def test_the_right_kubelet_directory_passes(kubelet: Path) -> None:
    """With links in place of mounts, what the kubelet makes is enough."""
    check_kubelet_dir(kubelet, shared=False)


def test_a_wrong_kubelet_directory_is_told_at_start(kubelet: Path, tmp_path: Path) -> None:
    """One clear line for each fault, all of them at once."""
    (kubelet / "plugins_registry").rmdir()
    with pytest.raises(CertmountError, match="has no plugins_registry, which every kubelet makes") as caught:
        check_kubelet_dir(kubelet, shared=False)
    assert caught.value.reason is Reason.INVALID_KUBELET_DIRECTORY
    with pytest.raises(CertmountError, match="has no plugins_registry and no pods"):
        check_kubelet_dir(tmp_path, shared=False)
    with pytest.raises(CertmountError, match="there is no folder /nowhere"):
        check_kubelet_dir(Path("/nowhere"))
    with pytest.raises(CertmountError, match="there is no folder relative"):
        check_kubelet_dir(Path("relative"))
