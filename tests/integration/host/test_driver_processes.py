"""Driver processes with their own mount namespace, on an older kernel, or without privileges."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.core.errors import CertmountError
from csi_driver.host import syscalls
from csi_driver.host.mountinfo import MountEntry
from csi_driver.host.target_paths import check_kubelet_dir
from tests.integration.host.conftest import mount_foreign, mounts_at, mounts_below
from tests.unit.host.samples import VOLUME_ID

pytestmark = [pytest.mark.root, pytest.mark.peers("unshare", "setpriv")]

OWN_NAMESPACE = ("unshare", "--mount", "--propagation", "unchanged")
OWN_USER_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "--propagation", "unchanged")
NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
RESTRICTED = {"ro", "nosuid", "nodev", "noexec"}


def drive(command: str, kubelet: Path, target: Path, wrapper: tuple[str, ...] = OWN_NAMESPACE) -> str:
    """Run the driver and return its standard error."""
    program = [sys.executable, "-m", "tests.integration.host.driver_process", command, str(kubelet), str(target)]
    return subprocess.run([*wrapper, *program], capture_output=True, text=True, check=False, timeout=60).stderr


@contextmanager
def observed(point: Path) -> Iterator[list[frozenset[str]]]:
    """Collect the options of all mounts that the host sees at ``point`` while the block runs."""
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
def test_host_and_pod_keep_the_mount_of_a_stopped_driver(kernel: str, shared_kubelet: Path, target: Path) -> None:
    """The target is read-only from the start, a new driver renews its files, and no mount is left at the end."""
    with observed(target) as seen:
        assert drive(f"{kernel}publish", shared_kubelet, target) == ""
    assert seen
    assert all(options >= RESTRICTED for options in seen)
    assert the_mount_at(target).options >= RESTRICTED
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "x").touch()
    assert (target / "site.crt").read_text() == "1 "
    assert drive(f"{kernel}renew", shared_kubelet, target) == ""
    assert (target / "site.crt").read_text() == "2 "
    assert drive(f"{kernel}publish", shared_kubelet, target) == ""
    volume = shared_kubelet / "plugins" / "csi.certmount.dev" / "volumes" / VOLUME_ID
    ours = [mount.point for mount in mounts_below(shared_kubelet) if mount.source == "certmount"]
    assert sorted(ours) == sorted([str(volume), str(target)])
    assert drive(f"{kernel}unpublish", shared_kubelet, target) == ""
    assert [mount.point for mount in mounts_below(shared_kubelet)] == [str(shared_kubelet)]
    assert not volume.exists()
    assert not target.exists()


def test_tmpfs_is_mounted_without_noswap_if_the_kernel_rejects_it(kubelet: Path, target: Path) -> None:
    tried = subprocess.run([*OWN_USER_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if "Operation not permitted" in tried.stderr:
        pytest.skip("this machine does not allow user namespaces")
    assert drive("publish", kubelet, target, OWN_USER_NAMESPACE) == ""


def test_missing_privileges_are_reported_with_a_hint(kubelet: Path, target: Path) -> None:
    error = drive("publish", kubelet, target, NO_CAPABILITIES)
    assert error.startswith("MountFailed: volume: could not mount a tmpfs at ")
    assert "Operation not permitted; the driver's container must be privileged" in error
    volumes = kubelet / "plugins" / "csi.certmount.dev" / "volumes"
    assert list(volumes.iterdir()) == []
    assert not target.exists()


def test_kubelet_directory_without_shared_propagation_is_rejected(shared_kubelet: Path) -> None:
    """No pod would see its volume."""
    check_kubelet_dir(shared_kubelet)
    syscalls.mount(None, str(shared_kubelet), None, 1 << 18)
    with pytest.raises(CertmountError, match=r"^InvalidKubeletDirectory: .*mountPropagation: Bidirectional") as caught:
        check_kubelet_dir(shared_kubelet)
    mount_foreign(shared_kubelet)
    with pytest.raises(CertmountError, match="does not contain plugins_registry and pods") as caught:
        check_kubelet_dir(shared_kubelet)
    assert len(caught.value.faults) == 2
