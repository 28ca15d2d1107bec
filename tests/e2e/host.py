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
from tests.e2e.kubectl import find, wait_until

KUBELET = Path("/var/lib/kubelet")
VOLUMES = KUBELET / "plugins" / DRIVER_NAME / "volumes"
NODE = "node1"
_LOCALKUBE = Path(__file__).parent / "localkube"
_CONTAINERD = "/run/localkube-containerd/containerd.sock"


class Mount(NamedTuple):
    """An entry of the host's mount table."""

    point: str
    options: frozenset[str]
    """The options of this mount, not of the file system."""
    source: str


def read_mounts() -> list[Mount]:
    """Read the host's mount table, proc_pid_mountinfo(5)."""
    lines = Path("/proc/1/mountinfo").read_text(encoding="utf-8").splitlines()
    return [
        Mount(fields[4], frozenset(fields[5].split(",")), fields[fields.index("-") + 2])
        for fields in map(str.split, lines)
    ]


def target_path(uid: str) -> Path:
    """Return the target path of the pod's certificate volume."""
    return KUBELET / "pods" / uid / "volumes" / "kubernetes.io~csi" / "tls" / "mount"


def mounts_at(path: Path) -> Sequence[Mount]:
    """Return all mounts at exactly this path."""
    return [mount for mount in read_mounts() if mount.point == str(path)]


def volume_directory(uid: str) -> Path:
    """Return the driver's directory of the pod's volume."""
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
    pods = find("pods", "-l", f"app.kubernetes.io/name={component}", "--field-selector", f"spec.nodeName={NODE}")
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and pod["status"].get("podIP")]


def authorities() -> list[Any]:
    """Return the pods of the authority."""
    return pods_of("certmount-authority")


def driver() -> Any:
    """Return the pod of the node driver."""
    return wait_until(lambda: pods_of("certmount-node"), seconds=60, what="a pod of the node driver")[0]


def restarts(pod: Any) -> int:
    """Return the number of restarts of the pod's first container."""
    count: int = pod["status"]["containerStatuses"][0]["restartCount"]
    return count


def process_of(pod: Any) -> int:
    """Return the process ID, on the host, of the pod's first container."""
    return _processes()[pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")]


def _processes() -> dict[str, int]:
    """Return the first process of each running container, by container ID."""
    command = ["ctr", "-a", _CONTAINERD, "-n", "k8s.io", "tasks", "ls"]
    tasks = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {container: int(pid) for container, pid in re.findall(r"^(\S+)\s+(\d+)\s+RUNNING", tasks, re.MULTILINE)}


def stop_component(name: str, seconds: float = 30) -> None:
    """Stop a Kubernetes component, such as ``kubelet``, with SIGTERM."""
    pid = int((Path(os.environ["LOCALKUBE_RUN"]) / f"{name}.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not _exists(pid), seconds=seconds, what=f"{name} stops")


def start_components(seconds: float = 90) -> bool:
    """Start all components that do not run; return True when the cluster is up."""
    up = subprocess.run([_LOCALKUBE / "up.sh"], check=False, capture_output=True, timeout=seconds)
    return up.returncode == 0


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
    port = pod["spec"]["containers"][0]["ports"][-1]["containerPort"]
    address = f"http://{pod['status']['podIP']}:{port}/metrics"
    with urllib.request.urlopen(address, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def publish_calls(pod: Any) -> float:
    """Return the number of NodePublishVolume calls of this driver."""
    return metric(pod, 'certmount_node_call_seconds_count{method="NodePublishVolume"')
