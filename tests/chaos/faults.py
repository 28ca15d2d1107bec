"""The faults: what is broken, for how long, and which of certmount's containers may restart because of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.background import PolicyEditor
from tests.chaos.clock import Clock
from tests.chaos.pairs import Pairs
from tests.chaos.volumes import VolumeMonitor
from tests.e2e import cluster, host

NODE, AUTHORITY = "certmount-node", "certmount-authority"
# A pod renews after 190 to 210 s of 300 s. A fault and the recovery from it must fit into the rest.
_OUTAGE_S = (20, 45)
_STEP_S = 600  # twice the lifetime of a certificate, and more than any clock skew that certmount tolerates
_START_S = 300
_HOG = """
import os, sys, time
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
kept = []
while True:
    kept.append(bytearray(b"x") * (1 << 20))
    time.sleep(0.02)  # 50 MB/s: the rest of the host keeps running until the limit is reached
"""


@dataclass(frozen=True)
class Scene:
    """What a fault can act on."""

    pairs: Pairs
    volumes: VolumeMonitor
    policy: PolicyEditor
    clock: Clock
    rng: random.Random

    def outage(self) -> float:
        """Let the outage last, and return its length in seconds."""
        seconds = float(self.rng.randint(*_OUTAGE_S))
        time.sleep(seconds)  # the length of the outage is the fault
        return seconds


@dataclass(frozen=True)
class Fault:
    """``cause`` starts the fault, ends it, and describes what it did. ``restarts`` are the components that can restart."""

    name: str
    cause: Callable[[Scene], str]
    restarts: frozenset[str] = field(default_factory=frozenset)


def _kill(component: str, *, at_once: bool = False) -> None:
    """Kill the processes of a component, one after the other: the next one dies when the former is ready again."""
    pods = host.pods_of(component)
    assert pods, f"{component} has no pods"
    for pod in pods:
        os.kill(host.process_of(pod), signal.SIGKILL)
        if not at_once:
            _wait_until_ready(component)


def _wait_until_ready(component: str) -> None:
    workload = "daemonset/certmount-node" if component == NODE else "deployment/certmount-authority"
    cluster.wait_until(lambda: _all_ready(component), seconds=_START_S, what=f"{workload} is ready")


def _all_ready(component: str) -> bool:
    pods = host.pods_of(component)
    ready = [pod for pod in pods if pod["status"]["containerStatuses"][0]["ready"] and host.runs(pod)]
    return len(pods) == len(ready) == (1 if component == NODE else 2)


def certmount_is_ready() -> bool:
    return _all_ready(NODE) and _all_ready(AUTHORITY)


def _kill_driver(_: Scene) -> str:
    _kill(NODE)
    return "SIGKILL"


def _replace_driver(_: Scene) -> str:
    cluster.kubectl("-n", cluster.CERTMOUNT, "rollout", "restart", "daemonset/certmount-node")
    cluster.wait_for_rollout("daemonset/certmount-node", seconds=_START_S)
    return "rollout restart"


def _kill_replicas(_: Scene) -> str:
    _kill(AUTHORITY)
    return "SIGKILL, one after the other"


def _kill_all_replicas(_: Scene) -> str:
    _kill(AUTHORITY, at_once=True)
    return "SIGKILL at the same time"


def _stop_authority(scene: Scene) -> str:
    with cluster.stopped_authority():
        seconds = scene.outage()
    return f"no replica for {seconds:g} s"


def _kill_driver_without_authority(scene: Scene) -> str:
    with cluster.stopped_authority():
        _kill(NODE, at_once=True)
        seconds = scene.outage()
    return f"SIGKILL, and no replica for {seconds:g} s"


@contextlib.contextmanager
def _stopped(name: str) -> Iterator[None]:
    host.stop_component(name, how=signal.SIGKILL)
    try:
        yield
    finally:
        cluster.wait_until(lambda: host.start_components(_START_S), seconds=_START_S, what="the cluster is up again")


def _kill_component(name: str) -> Callable[[Scene], str]:

    def kill(scene: Scene) -> str:
        with _stopped(name):
            seconds = scene.outage()
        return f"SIGKILL, unavailable for {seconds:g} s"

    return kill


def _kill_driver_without_api_server(scene: Scene) -> str:
    process = host.process_of(host.driver())
    with _stopped("apiserver"):
        os.kill(process, signal.SIGKILL)
        seconds = scene.outage()
    return f"SIGKILL, and no API server for {seconds:g} s"


def _fill_disk(scene: Scene) -> str:
    """Fill the kubelet's file system, which also has the driver's directory: no byte and no inode is left."""
    directory = host.KUBELET / "chaos"
    directory.mkdir()
    try:
        size = _fill(directory / "bytes")
        inodes = 0
        with contextlib.suppress(OSError):
            while inodes < 1 << 20:
                (directory / f"inode-{inodes}").touch()
                inodes += 1
        seconds = scene.outage()
    finally:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    return f"{size >> 20} MiB and {inodes} inodes written, full for {seconds:g} s"


def _fill(path: Path) -> int:
    """Write to a file until its file system is full, and return its size."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path.stat().st_size


def _fill_volumes(scene: Scene) -> str:
    """Fill the tmpfs of each pair's volumes, so that no renewal can write its files."""
    files = []
    for pod, uid in scene.pairs.uids.items():
        assert host.target_path(uid).exists(), pod
        files.append(host.volume_directory(uid) / "chaos")
        _fill(files[-1])
    seconds = scene.outage()
    for file in files:
        file.unlink()
    return f"{len(files)} volumes, full for {seconds:g} s"


def _fill_memory(component: str) -> Callable[[Scene], str]:

    def fill(scene: Scene) -> str:
        process = host.process_of(scene.rng.choice(host.pods_of(component)))
        hog = subprocess.Popen([sys.executable, "-c", _HOG, str(_memory_cgroup(process))])
        try:
            hog.wait(timeout=_START_S)  # until the kernel's OOM killer ends it
        finally:
            hog.kill()
            hog.wait()
        alive = Path(f"/proc/{process}").exists()
        return f"memory limit reached; the process {'survived' if alive else 'was killed'}"

    return fill


def _memory_cgroup(process: int) -> Path:
    lines = [line.split(":", 2) for line in Path(f"/proc/{process}/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/")
    return Path("/sys/fs/cgroup") / lines[0][2].lstrip("/")


def _step_clock(component: str) -> Callable[[Scene], str]:

    def step(scene: Scene) -> str:
        offset = scene.rng.choice((-_STEP_S, _STEP_S))
        with scene.clock.stepped(component, offset):
            seconds = scene.outage()
        return f"{offset:+d} s for {seconds:g} s"

    return step


def _forbid_names(scene: Scene) -> str:
    with scene.policy.forbidden():
        seconds = scene.outage()
    return f"the clients' names are not allowed for {seconds:g} s"


def _replace_peers(scene: Scene) -> str:
    pair = scene.rng.choice(scene.pairs.pairs)
    for pod in scene.rng.sample((pair.client, pair.server), 2):
        uid = scene.pairs.uids[pod]
        scene.volumes.deleting(uid)
        scene.pairs.replace(pair, pod)
        scene.volumes.deleted(uid)
        scene.volumes.watch(pod, scene.pairs.uids[pod])
    return f"both pods of pair {pair.number}"


FAULTS = (
    # The first ones are the most important: a short run has only these.
    Fault("driver killed", _kill_driver, frozenset({NODE})),
    Fault("authority: each replica killed", _kill_replicas, frozenset({AUTHORITY})),
    Fault("API server killed", _kill_component("apiserver")),
    Fault("volumes full", _fill_volumes),
    Fault("kubelet killed", _kill_component("kubelet")),
    Fault("etcd killed", _kill_component("etcd")),
    Fault("DNS killed", _kill_component("dns")),
    Fault("disk full", _fill_disk),
    Fault("driver: memory full", _fill_memory(NODE), frozenset({NODE})),
    Fault("authority: memory full", _fill_memory(AUTHORITY), frozenset({AUTHORITY})),
    Fault("driver: clock step", _step_clock(NODE)),
    Fault("authority: clock step", _step_clock(AUTHORITY)),
    Fault("policy forbids names", _forbid_names),
    Fault("peers replaced", _replace_peers),
    Fault("driver replaced", _replace_driver, frozenset({NODE})),
    Fault("authority: all replicas killed", _kill_all_replicas, frozenset({AUTHORITY})),
    Fault("authority unavailable", _stop_authority, frozenset({AUTHORITY})),
    Fault("driver killed without authority", _kill_driver_without_authority, frozenset({NODE, AUTHORITY})),
    Fault("driver killed without API server", _kill_driver_without_api_server, frozenset({NODE})),
)
