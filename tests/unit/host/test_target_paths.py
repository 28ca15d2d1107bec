"""The checks of target paths and of the kubelet directory."""

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
def shared_kubelet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kubelet")
    for pod in (POD_UID, "other"):
        (root / "pods" / pod / "volumes" / "tls").mkdir(parents=True)
    return root


def rejection(kubelet_dir: Path, target: object, pod_uid: str = POD_UID) -> CertmountError:
    with pytest.raises(CertmountError) as caught:
        check_target(kubelet_dir, str(target), pod_uid)
    return caught.value


def test_target_is_accepted_before_and_after_its_creation(kubelet: Path, target: Path) -> None:
    assert check_target(kubelet, str(target), POD_UID) == target
    target.mkdir()
    assert check_target(kubelet, str(target), POD_UID) == target


@pytest.mark.parametrize("kind", ["file", "pipe", "/etc", "/nowhere", "."])
def test_target_that_is_not_a_directory_is_rejected(kubelet: Path, target: Path, kind: str) -> None:
    if kind == "file":
        target.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(kind)
    assert str(rejection(kubelet, target)) == (
        f"InvalidTargetPath: target_path: {target} is not a directory; remove it from the node; the kubelet then retries"
    )
    assert os.path.lexists(target)


def test_link_of_directory_mounts_is_accepted(kubelet: Path, target: Path) -> None:
    """Without root, a published target is a link to the driver's own directory."""
    target.symlink_to(kubelet / "plugins" / "csi.certmount.dev" / "volumes" / "x" / "files")
    assert check_target(kubelet, str(target), POD_UID) == target


@pytest.mark.parametrize(
    "text", ["", "mount", "../mount", "{t}/", "{t}/../mount", "{t}/.", "/{t}", "{t}\0", "{t}\n", "{t}//x"]
)
def test_path_that_is_not_normalized_is_rejected(kubelet: Path, target: Path, text: str) -> None:
    error = rejection(kubelet, text.format(t=target))
    assert error.reason is Reason.INVALID_REQUEST
    assert "target_path" in str(error)


@pytest.mark.parametrize("uid", ["", ".", "..", "a/b", "../../etc", "a\0", "a\n", "x" * 129])
def test_pod_uid_that_is_a_path_is_rejected(kubelet: Path, target: Path, uid: str) -> None:
    assert rejection(kubelet, target, uid).reason is Reason.INVALID_REQUEST


def test_other_kubelet_directory_is_reported_with_the_option(kubelet: Path, target: Path) -> None:
    other = f"/var/lib/k0s/kubelet/pods/{POD_UID}/volumes/kubernetes.io~csi/tls/mount"
    error = rejection(kubelet, other)
    assert error.reason is Reason.INVALID_KUBELET_DIRECTORY
    for words in ("--kubelet-dir", str(kubelet), other, "set --kubelet-dir to /var/lib/k0s/kubelet,"):
        assert words in str(error)
    assert "--root-dir" in str(rejection(kubelet, "/mnt/x"))
    assert rejection(kubelet, f"{kubelet}-2/pods/{POD_UID}/volumes/x").reason is Reason.INVALID_KUBELET_DIRECTORY
    assert rejection(Path("/var/lib/kubelet"), target).reason is Reason.INVALID_KUBELET_DIRECTORY


def test_target_outside_the_pods_directory_is_rejected(kubelet: Path, target: Path) -> None:
    for path in (target, kubelet / "plugins" / "x", kubelet / "pods" / "uid" / "volumes"):
        assert rejection(kubelet, path, "uid").reason is Reason.INVALID_TARGET_PATH


def test_missing_parent_is_explained(kubelet: Path, target: Path) -> None:
    """The kubelet creates it. If it is missing, the driver sees another directory than the kubelet."""
    target.parent.rmdir()
    error = rejection(kubelet, target)
    assert error.reason is Reason.INVALID_TARGET_PATH
    assert "at the same path" in str(error)


def test_name_that_is_too_long_is_rejected(kubelet: Path, target: Path) -> None:
    assert rejection(kubelet, target.with_name("x" * 300)).reason is Reason.INVALID_TARGET_PATH


@given(
    parts=st.lists(st.sampled_from(["..", ".", "", "pods", POD_UID, "volumes", "tls", "other"]) | st.text(max_size=9))
)
def test_accepted_target_is_among_the_pods_volumes(shared_kubelet: Path, parts: list[str]) -> None:
    volumes = shared_kubelet / "pods" / POD_UID / "volumes"
    for target in ("/".join(parts), "/".join([str(shared_kubelet), *parts]), "/".join([str(volumes), *parts])):
        try:
            path = check_target(shared_kubelet, target, POD_UID)
        except CertmountError:
            continue
        assert path.resolve().is_relative_to(volumes.resolve())
        assert path != volumes


def test_kubelet_directory_is_checked_at_start(kubelet: Path, tmp_path: Path) -> None:
    check_kubelet_dir(kubelet, shared=False)
    (kubelet / "plugins_registry").rmdir()
    with pytest.raises(
        CertmountError, match=r"^InvalidKubeletDirectory: .*does not contain plugins_registry, which every kubelet"
    ):
        check_kubelet_dir(kubelet, shared=False)
    with pytest.raises(CertmountError, match="does not contain plugins_registry and pods"):
        check_kubelet_dir(tmp_path, shared=False)
    for path in ("/nowhere", "relative"):
        with pytest.raises(CertmountError, match=f"the directory {path} does not exist"):
            check_kubelet_dir(Path(path))
