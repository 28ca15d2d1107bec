"""The node, which is this machine: its mount table, the driver's folders, its processes."""

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
    """A line of the host's mount table: where, the options of this mount alone, and what is mounted."""

    point: str
    options: frozenset[str]
    source: str


def read_mounts() -> list[Mount]:
    """The host's mount table, proc_pid_mountinfo(5)."""
    lines = Path("/proc/1/mountinfo").read_text(encoding="utf-8").splitlines()
    return [
        Mount(fields[4], frozenset(fields[5].split(",")), fields[fields.index("-") + 2])
        for fields in map(str.split, lines)
    ]


def target_of(uid: str) -> Path:
    """Where the pod's certificate volume is mounted on the host."""
    return KUBELET / "pods" / uid / "volumes" / "kubernetes.io~csi" / "tls" / "mount"


def mounts_at(path: Path) -> Sequence[Mount]:
    """What is mounted at this very path, one on the other."""
    return [mount for mount in read_mounts() if mount.point == str(path)]


def volume_folder(uid: str) -> Path:
    """The driver's folder of the pod's volume, found by its record."""
    for folder in VOLUMES.iterdir():
        if json.loads((folder / "record.json").read_text())["pod_uid"] == uid:
            return folder
    raise AssertionError(f"the driver has no record of pod {uid}")


def traces_of(uid: str, folder: Path) -> Sequence[str]:
    """All that the host still has of a pod and its volume: mounts, folders, records."""
    mounts = [mount.point for mount in read_mounts() if uid in mount.point or str(folder) in mount.point]
    records = [str(record) for record in VOLUMES.glob("*/record*") if uid in record.read_text()]
    folders = [str(path) for path in (KUBELET / "pods" / uid, folder) if os.path.lexists(path)]
    return [*mounts, *records, *folders]


def pods_of(component: str) -> list[Any]:
    """The pods of certmount-node (on this node) or certmount-authority that run, none that is being deleted."""
    pods = find("pods", "-l", f"app.kubernetes.io/name={component}", "--field-selector", f"spec.nodeName={NODE}")
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and pod["status"].get("podIP")]


def driver() -> Any:
    """The node driver's pod."""
    return wait_until(lambda: pods_of("certmount-node"), seconds=60, what="a pod of the node driver")[0]


def process_of(pod: Any) -> int:
    """The first process of the pod's container, by its number on the host."""
    return _processes()[pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")]


def _processes() -> dict[str, int]:
    """The first process of each container of the cluster that runs, by the container's id."""
    command = ["ctr", "-a", _CONTAINERD, "-n", "k8s.io", "tasks", "ls"]
    tasks = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {container: int(pid) for container, pid in re.findall(r"^(\S+)\s+(\d+)\s+RUNNING", tasks, re.MULTILINE)}


def restart_kubelet() -> None:
    """Ends the kubelet as a service manager does, and starts it again."""
    _stop_kubelet()
    _start_kubelet()


def reboot() -> None:
    """Leaves what a reboot leaves: no container, none of certmount's mounts, and the disk as it was; then the kubelet starts."""
    _stop_kubelet()
    for process in _processes().values():
        os.kill(process, signal.SIGKILL)
    for mount in reversed(read_mounts()):
        if mount.source == "certmount" and Path(mount.point).is_relative_to(KUBELET):
            subprocess.run(["umount", "--lazy", mount.point], check=True)
    _start_kubelet()


def _stop_kubelet() -> None:
    run = Path(os.environ["LOCALKUBE_RUN"])
    pid = int((run / "kubelet.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not _alive(pid), seconds=30, what="the kubelet ends")


def _start_kubelet() -> None:
    subprocess.run([_LOCALKUBE / "up.sh"], check=True, capture_output=True, timeout=90)


def _alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def metric(pod: Any, name: str) -> float:
    """The sum of a metric over all of its labels that ``name`` does not give: ``calls{method="x"``."""
    port = pod["spec"]["containers"][0]["ports"][-1]["containerPort"]
    address = f"http://{pod['status']['podIP']}:{port}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def republished(pod: Any) -> float:
    """How often the kubelet has called NodePublishVolume of this driver."""
    return metric(pod, 'certmount_node_call_seconds_count{method="NodePublishVolume"')
