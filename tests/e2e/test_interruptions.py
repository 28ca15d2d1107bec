"""Everything that may fail fails: no pod loses its certificate, and nothing is issued that nobody asked for."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e import host
from tests.e2e.host import metric, mounts_at, restart_kubelet, target_of, traces_of, volume_folder
from tests.e2e.kubectl import CERTMOUNT, apply, find, kubectl, make_namespace, roll_out, wait_for, wait_until
from tests.e2e.logs import LogKeeper
from tests.e2e.pods import TLS, Pod, manifest

NAMESPACE = "e2e-interruptions"
STEADY = [Pod(NAMESPACE, f"steady-{number}") for number in range(4)]
"""Their certificates last for a day: whatever is issued for them after the first one is a mistake."""
BRISK = Pod(NAMESPACE, "brisk")
"""Its certificate is renewed about every 26 seconds."""
MANY = 40


@pytest.fixture(scope="module", autouse=True)
def scene() -> None:
    """The pods that live through everything."""
    make_namespace(NAMESPACE)
    apply(manifest(BRISK, {"duration": "40s"}), *(manifest(pod, {}) for pod in STEADY))
    wait_for("Ready", "pod", "--all", namespace=NAMESPACE)


def _state() -> dict[str, tuple[str, str, int]]:
    """Of each steady pod: its certificate and key, and how often it was started again."""
    return {pod.name: (pod.read("site.crt"), pod.read("site.key"), pod.restarts()) for pod in STEADY}


def _next_rotation(seconds: float) -> None:
    """Waits until the brisk pod, unharmed, sees another certificate than now."""
    before = BRISK.read("site.crt")
    wait_until(lambda: BRISK.read("site.crt") != before, seconds=seconds, what="the running pod sees the next rotation")
    assert BRISK.restarts() == 0


def _registrations(logs: LogKeeper) -> int:
    return sum(event["event"] == "registered with the kubelet" for event in logs.events("certmount-node"))


def _look_after(logs: LogKeeper, what: str, begin: int) -> None:
    """Waits until the driver is registered once more and the kubelet has looked at all volumes."""
    wait_until(lambda: _registrations(logs) > begin, seconds=60, what=f"registered again after {what}")
    driver = host.driver()
    calls = host.republished(driver)
    wait_until(
        lambda: host.republished(driver) >= calls + len(STEADY) + 1, seconds=60, what=f"all published after {what}"
    )


def _one_mount_each() -> None:
    for pod in (*STEADY, BRISK):
        assert len(mounts_at(target_of(pod.uid))) == 1, pod.name
        assert len(mounts_at(volume_folder(pod.uid))) == 1, pod.name


@pytest.mark.timeout(240)
@pytest.mark.parametrize("what", ["killed by SIGKILL", "pod deleted"])
def test_driver_restarts_and_nothing_is_issued_again(what: str, logs: LogKeeper) -> None:
    """Whether its process is killed or its pod is replaced: 0 certificates re-issued, and a running pod sees the next rotation."""
    before, uids, begin = _state(), [pod.uid for pod in STEADY], _registrations(logs)
    pod = host.driver()
    if what == "pod deleted":
        kubectl("-n", CERTMOUNT, "delete", "pod", pod["metadata"]["name"])
    else:
        os.kill(host.process_of(pod), signal.SIGKILL)
    _look_after(logs, what, begin)
    _next_rotation(seconds=60)
    assert _state() == before
    assert [logs.issued(uid) for uid in uids] == [1] * len(uids)
    _one_mount_each()


@pytest.mark.timeout(240)
def test_kubelet_restarts_three_times(logs: LogKeeper) -> None:
    """All volumes are published again at once each time: still one mount each, and 0 certificates re-issued."""
    before, uids = _state(), [pod.uid for pod in STEADY]
    for number in range(3):
        begin = _registrations(logs)
        restart_kubelet()
        _look_after(logs, f"restart {number + 1} of the kubelet", begin)
    _one_mount_each()
    assert _state() == before
    assert [logs.issued(uid) for uid in uids] == [1] * len(uids)


@contextlib.contextmanager
def _authority_away() -> Iterator[None]:
    kubectl("-n", CERTMOUNT, "scale", "deployment/certmount-authority", "--replicas=0")
    try:
        wait_for("delete", "pod", "-l", "app.kubernetes.io/name=certmount-authority")
        yield
    finally:
        kubectl("-n", CERTMOUNT, "scale", "deployment/certmount-authority", "--replicas=2")
        roll_out("deployment/certmount-authority")


@pytest.mark.timeout(300)
def test_authority_is_away_past_a_renewal(logs: LogKeeper) -> None:
    """While no replica runs a pod keeps its files, though they could not be renewed; within a minute of the return they are."""
    steady = _state()
    driver = host.driver()

    def missed() -> int:
        events = logs.events("certmount-node")
        return sum(event["event"] == "renewal failed" and event.get("pod") == str(BRISK) for event in events)

    before = missed()
    with _authority_away():
        files = BRISK.read("site.pem")
        wait_until(lambda: missed() > before, seconds=60, what="a missed renewal")
        calls = host.republished(driver)
        wait_until(lambda: host.republished(driver) > calls + len(STEADY) + 1, seconds=60, what="a republish after it")
        assert metric(driver, "certmount_node_volumes_unhealthy") >= 1
        assert BRISK.read("site.pem") == files
        assert len(mounts_at(target_of(BRISK.uid))) == 1
    wait_until(lambda: BRISK.read("site.pem") != files, seconds=60, what="healed within a minute of the return")
    wait_until(
        lambda: not metric(driver, "certmount_node_volumes_unhealthy"), seconds=60, what="all volumes are healed"
    )
    assert BRISK.restarts() == 0
    assert _state() == steady


@pytest.mark.timeout(300)
def test_replica_dies_while_forty_pods_start_and_they_end_without_a_trace(logs: LogKeeper) -> None:
    """The death of the replica that issues costs none of forty starting pods a failure; deleted at once, they leave nothing."""
    names = [f"many-{number}" for number in range(MANY)]
    earlier = len(_issued_to_many(logs))
    processes = {pod["metadata"]["name"]: host.process_of(pod) for pod in host.pods_of("certmount-authority")}
    with ThreadPoolExecutor(1) as side:
        # On the side, as the first certificates are issued before the last pod is made.
        made = side.submit(apply, *(manifest(Pod(NAMESPACE, name), {}, labels={"app": "many"}) for name in names))
        first = wait_until(
            lambda: _issued_to_many(logs)[earlier:], seconds=60, pause=0.02, what="the first of the certificates"
        )
        (victim,) = [process for name, process in processes.items() if name in first[-1]]
        os.kill(victim, signal.SIGKILL)
        issued_before = len(_issued_to_many(logs)) - earlier
        made.result()
    wait_for("Ready", "pod", "-l", "app=many", namespace=NAMESPACE, seconds=120)
    assert issued_before < MANY / 2, "the replica died too late to matter"
    failed = [
        event["message"]
        for event in find("events", "--field-selector", "reason=FailedMount", namespace=NAMESPACE)
        if event["involvedObject"]["name"] in names
    ]
    assert failed == []

    pods = find("pods", "-l", "app=many", namespace=NAMESPACE)
    left = {uid: volume_folder(uid) for uid in (pod["metadata"]["uid"] for pod in pods)}
    assert len(left) == MANY
    begin = time.monotonic()
    kubectl("-n", NAMESPACE, "delete", "pods", "-l", "app=many", "--wait=false")
    wait_for("delete", "pod", "-l", "app=many", namespace=NAMESPACE, seconds=90)
    wait_until(
        lambda: not [trace for uid, folder in left.items() for trace in traces_of(uid, folder)],
        seconds=60,
        what="nothing is left of forty pods",
    )
    print(f"{MANY} pods were gone without a trace after {time.monotonic() - begin:.1f} s")


@pytest.mark.timeout(240)
def test_node_reboots() -> None:
    """After a reboot, which takes every volume away, a pod's first command finds the files of a new certificate."""
    pod = Pod(NAMESPACE, "rebooted")
    check = f"grep -q -e '-----END' {TLS}/site.key && grep -q -e '-----END' {TLS}/site.crt || exit 1"
    command = ["/bin/sh", "-c", f"{check}; trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"]
    found = manifest(pod, {}, command=command)
    found["spec"]["restartPolicy"] = "Always"
    apply(found)
    wait_for("Ready", f"pod/{pod.name}", namespace=NAMESPACE)
    before, uid = pod.read("site.crt"), pod.uid
    host.reboot()
    wait_until(lambda: pod.restarts() > 0, seconds=90, what="the pod runs again")
    wait_for("Ready", f"pod/{pod.name}", namespace=NAMESPACE)
    assert (pod.uid, pod.restarts()) == (uid, 1)
    assert pod.read("site.crt") != before
    assert len(mounts_at(target_of(uid))) == len(mounts_at(volume_folder(uid))) == 1
    roll_out("deployment/certmount-authority", "daemonset/certmount-node")


def _issued_to_many(logs: LogKeeper) -> list[str]:
    """The log file of the replica that issued, for each certificate of the many pods."""
    return [
        event["file"]
        for event in logs.events("certmount-authority")
        if event.get("decision") == "issued" and str(event.get("pod")).startswith("many-")
    ]
