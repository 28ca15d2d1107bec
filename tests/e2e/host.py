"""The node, which is this machine: its mount table, the driver's directories, its processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csi_driver import DRIVER_NAME
from tests.e2e import cluster

KUBELET = Path("/var/lib/kubelet")
VOLUMES = KUBELET / "plugins" / DRIVER_NAME / "volumes"
NODE = "node1"
LOCALKUBE = Path(__file__).parent / "localkube"
_CONTAINERD = "/run/localkube-containerd/containerd.sock"


class Mount(NamedTuple):
    """An entry of the host's mount table."""

    point: str
    options: frozenset[str]  # of this mount, not of the file system
    source: str


def read_mounts() -> list[Mount]:
    """Read the host's mount table, proc_pid_mountinfo(5)."""
    lines = Path("/proc/1/mountinfo").read_text(encoding="utf-8").splitlines()
    return [
        Mount(fields[4], frozenset(fields[5].split(",")), fields[fields.index("-") + 2])
        for fields in map(str.split, lines)
    ]


def target_path(uid: str) -> Path:
    return KUBELET / "pods" / uid / "volumes" / "kubernetes.io~csi" / "tls" / "mount"


def mounts_at(path: Path) -> Sequence[Mount]:
    """Return all mounts at exactly this path."""
    return [mount for mount in read_mounts() if mount.point == str(path)]


def volume_directory(uid: str) -> Path:
    for directory in VOLUMES.iterdir():
        if json.loads((directory / "record.json").read_text())["pod_uid"] == uid:
            return directory
    raise AssertionError(f"the driver has no record of pod {uid}")


def leftovers_of(uid: str, directory: Path) -> Sequence[str]:
    """Return all mounts, directories and records of a pod and its volume on the host."""
    mounts = [mount.point for mount in read_mounts() if uid in mount.point or str(directory) in mount.point]
    records = [str(record) for record in VOLUMES.glob("*/record*") if uid in record.read_text()]
    directories = [str(path) for path in (KUBELET / "pods" / uid, directory) if os.path.lexists(path)]
    return [*mounts, *records, *directories]


def pods_of(component: str) -> list[Any]:
    """Return the pods of certmount-node or certmount-authority on this node that have an IP and are not being deleted."""
    pods = cluster.find(
        "pods", "-l", f"app.kubernetes.io/name={component}", "--field-selector", f"spec.nodeName={NODE}"
    )
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and pod["status"].get("podIP")]


def authorities() -> list[Any]:
    return pods_of("certmount-authority")


def driver() -> Any:
    return cluster.wait_until(lambda: pods_of("certmount-node"), seconds=60, what="a pod of the node driver")[0]


def restarts(pod: Any) -> int:
    return int(pod["status"]["containerStatuses"][0]["restartCount"])


def process_of(pod: Any) -> int:
    """Return the process ID, on the host, of the pod's first container."""
    return _processes()[pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")]


def runs(pod: Any) -> bool:
    """Return False if the pod's first container has ended, which the kubelet notices only after a moment."""
    return pod["status"]["containerStatuses"][0].get("containerID", "").removeprefix("containerd://") in _processes()


def tag_image(image: str, other: str) -> None:
    """Give an image of the container runtime another name."""
    _containerd("images", "tag", "--force", image, other)


def _containerd(*arguments: str) -> str:
    command = ["ctr", "-a", _CONTAINERD, "-n", "k8s.io", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _processes() -> dict[str, int]:
    """Return the first process of each running container, by container ID."""
    tasks = _containerd("tasks", "ls")
    return {container: int(pid) for container, pid in re.findall(r"^(\S+)\s+(\d+)\s+RUNNING", tasks, re.MULTILINE)}


def stop_component(name: str, seconds: float = 30, *, how: signal.Signals = signal.SIGTERM) -> None:
    """Stop a Kubernetes component, such as ``kubelet``, with a signal."""
    pid = int((Path(os.environ["LOCALKUBE_RUN"]) / f"{name}.pid").read_text())
    os.kill(pid, how)
    cluster.wait_until(lambda: not _exists(pid), seconds=seconds, what=f"{name} stops")


def start_components(seconds: float = 90) -> bool:
    """Start all components that do not run; return True when the cluster is up."""
    return subprocess.run([LOCALKUBE / "up.sh"], check=False, capture_output=True, timeout=seconds).returncode == 0


def exists() -> bool:
    """Return True if the cluster's state exists, also while its components do not run."""
    return (Path(os.environ["LOCALKUBE_RUN"]) / "pki").exists()


def restart_kubelet() -> None:
    stop_component("kubelet")
    assert start_components()


def reboot() -> None:
    """Simulate a reboot: no containers and no mounts of certmount remain, but the disk does; then start the kubelet."""
    stop_component("kubelet")
    for process in _processes().values():
        os.kill(process, signal.SIGKILL)
    for mount in reversed(read_mounts()):
        if mount.source == "certmount" and Path(mount.point).is_relative_to(KUBELET):
            subprocess.run(["umount", "--lazy", mount.point], check=True)
    assert start_components()


def _exists(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def metric(pod: Any, name: str) -> float:
    """Return the sum of a metric over all labels that ``name`` does not contain: ``calls{method="x"``."""
    return sum(float(line.rpartition(" ")[2]) for line in metrics_page(pod).splitlines() if line.startswith(name))


def metrics_page(pod: Any) -> str:
    port = pod["spec"]["containers"][0]["ports"][-1]["containerPort"]
    address = f"http://{pod['status']['podIP']}:{port}/metrics"
    with urllib.request.urlopen(address, timeout=10) as response:
        page: str = response.read().decode()
        return page


def publish_calls(pod: Any) -> float:
    return metric(pod, 'certmount_node_call_duration_seconds_count{method="NodePublishVolume"')
