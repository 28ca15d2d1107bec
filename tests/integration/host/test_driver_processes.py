"""A driver with its own mount namespace, on an older kernel, or without rights: each a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.host import syscalls
from csi_driver.host.mountinfo import MountEntry
from csi_driver.host.target_paths import check_kubelet_dir
from tests.integration.host.conftest import mount_stranger, mounts_at, mounts_below
from tests.unit.host.samples import VOLUME_ID

pytestmark = [pytest.mark.root, pytest.mark.peers("unshare", "setpriv")]

OWN_NAMESPACE = ("unshare", "--mount", "--propagation", "unchanged")
OWN_USERS = ("unshare", "--user", "--map-root-user", "--mount", "--propagation", "unchanged")
NO_RIGHTS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
HARMLESS = {"ro", "nosuid", "nodev", "noexec"}


def drive(command: str, kubelet: Path, target: Path, wrapper: tuple[str, ...] = OWN_NAMESPACE) -> str:
    """Runs the driver to its end, and gives what it complained about."""
    program = [sys.executable, "-m", "tests.integration.host.driver_process", command, str(kubelet), str(target)]
    return subprocess.run([*wrapper, *program], capture_output=True, text=True, check=False, timeout=60).stderr


@contextmanager
def observed(point: Path) -> Iterator[list[frozenset[str]]]:
    """The options of every mount that the host sees at ``point`` while the block runs."""
    seen: list[frozenset[str]] = []
    done = threading.Event()

    def observe() -> None:
        while not done.is_set():
            seen.extend(mount.options for mount in mounts_at(point))

    thread = threading.Thread(target=observe)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def the_mount_at(target: Path) -> MountEntry:
    (mount,) = mounts_at(target)
    return mount


@pytest.mark.parametrize("kernel", ["", "old-kernel-"])
def test_the_host_and_the_pod_outlive_the_driver(kernel: str, shared_kubelet: Path, target: Path) -> None:
    """A target is read-only in the host's mount table from its first moment, and a new driver's rotation reaches it; no mount is left."""
    with observed(target) as seen:
        assert drive(f"{kernel}publish", shared_kubelet, target) == ""
    assert seen
    assert all(options >= HARMLESS for options in seen)
    assert the_mount_at(target).options >= HARMLESS
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "x").touch()
    assert (target / "site.crt").read_text() == "1 "
    assert drive(f"{kernel}rotate", shared_kubelet, target) == ""
    assert (target / "site.crt").read_text() == "2 "
    assert drive(f"{kernel}publish", shared_kubelet, target) == ""
    volume = shared_kubelet / "plugins" / "csi.certmount.dev" / "volumes" / VOLUME_ID
    ours = [mount.point for mount in mounts_below(shared_kubelet) if mount.source == "certmount"]
    assert sorted(ours) == sorted([str(volume), str(target)])
    assert drive(f"{kernel}unpublish", shared_kubelet, target) == ""
    assert [mount.point for mount in mounts_below(shared_kubelet)] == [str(shared_kubelet)]
    assert not volume.exists()
    assert not target.exists()


def test_an_unknown_tmpfs_option_is_left_out(kubelet: Path, target: Path) -> None:
    """Where the kernel refuses noswap, as it does in a user namespace, the tmpfs is made without it."""
    if (
        "Operation not permitted"
        in subprocess.run([*OWN_USERS, "true"], capture_output=True, text=True, check=False).stderr
    ):
        pytest.skip("this machine allows no user namespaces")
    assert drive("publish", kubelet, target, OWN_USERS) == ""


def test_without_rights_the_hint_says_what_is_missing(kubelet: Path, target: Path) -> None:
    """A container that is not privileged fails with the path, the kernel's words and what to change."""
    complaint = drive("publish", kubelet, target, NO_RIGHTS)
    assert complaint.startswith("MountFailed: volume: could not mount a tmpfs at ")
    assert "Operation not permitted; the driver's container must be privileged" in complaint
    volumes = kubelet / "plugins" / "csi.certmount.dev" / "volumes"
    assert list(volumes.iterdir()) == []
    assert not target.exists()


def test_only_a_shared_kubelet_directory_will_do(shared_kubelet: Path) -> None:
    """Without Bidirectional propagation no pod would see its volume, so the driver says so at its start."""
    check_kubelet_dir(shared_kubelet)
    syscalls.mount(None, str(shared_kubelet), None, 1 << 18)
    with pytest.raises(CertmountError, match="mountPropagation: Bidirectional") as caught:
        check_kubelet_dir(shared_kubelet)
    assert caught.value.reason is Reason.INVALID_KUBELET_DIRECTORY
    mount_stranger(shared_kubelet)
    with pytest.raises(CertmountError, match="has no plugins_registry and no pods") as caught:
        check_kubelet_dir(shared_kubelet)
    assert len(caught.value.faults) == 2
