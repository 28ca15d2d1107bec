"""One fault, and the time until everything works again after it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from tests.chaos.background import Churn
from tests.chaos.faults import Fault, Scene, certmount_is_ready
from tests.chaos.pairs import NAMESPACE, restarts
from tests.e2e import cluster, host
from tests.e2e.pods import Pod, manifest

_RECOVERY_S = 240.0
_PROBE = Pod(NAMESPACE, "probe")


@dataclass
class Round:
    """A fault that happened, with its times in unix seconds and what failed because of it."""

    fault: Fault
    begin: float
    end: float = 0.0
    healthy: float | None = None  # certmount's pods are ready, all volumes are healthy and all pairs connect
    recovered: float | None = None  # also, a new pod is ready
    description: str = ""
    problems: tuple[str, ...] = ()


def inflict(fault: Fault, scene: Scene, churn: Churn) -> Round:
    """Cause a fault, and wait until a new pod starts, all volumes are healthy and all pairs connect."""
    one = Round(fault, time.time())
    if not host.exists():
        one.problems += ("the cluster is gone: another program has deleted it",)
        return one
    before = restarts()
    churn.disturbed = True
    try:
        one.description = fault.cause(scene)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        one.problems += (f"{fault.name}: the fault did not end: {error}",)
    one.end, ended = time.time(), time.monotonic()
    churn.undisturbed_since, churn.disturbed = ended, False
    try:
        _wait_for_recovery(one, scene, ended)
        one.recovered = time.time()
        one.problems += tuple(_unexpected_restarts(fault, before, restarts()))
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        one.problems += (f"{fault.name}: no recovery: {error}",)
    _print(one)
    return one


def _wait_for_recovery(one: Round, scene: Scene, since: float) -> None:

    def wait(what: str, step: Callable[[], object]) -> None:
        """Repeat a step until it neither fails nor returns False."""
        seconds = max(since + _RECOVERY_S - time.monotonic(), 1)
        cluster.wait_until(lambda: _works(step), seconds=seconds, what=what)

    wait("certmount's pods are ready", certmount_is_ready)
    wait("all pairs connect", lambda: scene.pairs.all_succeeded_since(since))
    wait("all volumes are healthy", lambda: host.metric(host.driver(), "certmount_node_volumes_unhealthy") == 0)
    one.healthy = time.time()
    wait("a probe pod is created", lambda: cluster.apply(manifest(_PROBE, {"duration": "5m"})))
    uid = _PROBE.uid
    wait("a new pod is ready", lambda: _PROBE.wait_until_ready(5))
    _PROBE.delete()
    scene.volumes.deleted(uid)


def _works(step: Callable[[], object]) -> bool:
    try:
        return step() is not False
    except (cluster.KubectlError, OSError, subprocess.SubprocessError):
        return False


def _unexpected_restarts(fault: Fault, before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [
        f"{fault.name}: {pod} restarted or was replaced"
        for pod, count in before.items()
        if pod.split("/")[0] not in fault.restarts and after.get(pod, count + 1) > count
    ]


def _print(one: Round) -> None:
    begin = datetime.fromtimestamp(one.begin, UTC)
    recovery = "NOT RECOVERED"
    if one.healthy and one.recovered:
        recovery = f"healthy after {one.healthy - one.end:.1f} s, new pod after {one.recovered - one.end:.1f} s"
    print(f"{begin:%H:%M:%S} {one.fault.name}: {one.description}; {recovery}", flush=True)
    for problem in one.problems:
        print(f"  {problem}", flush=True)
