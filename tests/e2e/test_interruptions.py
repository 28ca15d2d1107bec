"""Restarts and outages of each component: no pod loses its certificate, and no certificate is issued twice."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e import cluster, host
from tests.e2e.host import leftovers_of, metric, mounts_at, restart_kubelet, target_path, volume_directory
from tests.e2e.logs import DRIVER, LogCollector
from tests.e2e.pods import TLS, Pod, manifest

NAMESPACE = "e2e-interruptions"
# Their certificates have a lifetime of a day, so each second certificate is an error.
LONG_LIVED = [Pod(NAMESPACE, f"long-lived-{number}") for number in range(4)]
SHORT_LIVED = Pod(NAMESPACE, "short-lived")  # the driver renews its certificate about every 26 seconds
MANY = 40


@pytest.fixture(scope="module", autouse=True)
def scene() -> None:
    cluster.create_namespace(NAMESPACE)
    cluster.apply(manifest(SHORT_LIVED, {"duration": "40s"}), *(manifest(pod, {}) for pod in LONG_LIVED))
    cluster.wait_for("Ready", "pod", "--all", namespace=NAMESPACE)


def _state() -> dict[str, tuple[str, str, int]]:
    """Return certificate, key and restarts of each long-lived pod."""
    return {pod.name: (pod.read("site.crt"), pod.read("site.key"), pod.restarts()) for pod in LONG_LIVED}


def _wait_for_rotation() -> None:
    before = SHORT_LIVED.read("site.crt")
    cluster.wait_until(lambda: SHORT_LIVED.read("site.crt") != before, seconds=60, what="a renewal in the running pod")
    assert SHORT_LIVED.restarts() == 0


def _registrations(logs: LogCollector) -> int:
    return sum(event["event"] == "registered with the kubelet" for event in logs.events(DRIVER))


def _wait_for_republish() -> None:
    driver = host.driver()
    calls = host.publish_calls(driver) + len(LONG_LIVED) + 1
    cluster.wait_until(lambda: host.publish_calls(driver) >= calls, seconds=60, what="a republish of all volumes")


def _wait_for_recovery(logs: LogCollector, registrations: int) -> None:
    """Wait until the driver has registered again and all volumes are republished."""
    cluster.wait_until(lambda: _registrations(logs) > registrations, seconds=60, what="the driver registers again")
    _wait_for_republish()


def _assert_one_mount_each() -> None:
    for pod in (*LONG_LIVED, SHORT_LIVED):
        assert len(mounts_at(target_path(pod.uid))) == 1, pod.name
        assert len(mounts_at(volume_directory(pod.uid))) == 1, pod.name


def _assert_issued_once(logs: LogCollector) -> None:
    assert [len(logs.issued(pod.uid)) for pod in LONG_LIVED] == [1] * len(LONG_LIVED)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", ["SIGKILL", "pod deleted"])
def test_driver_restart_issues_no_certificate_again(how: str, logs: LogCollector) -> None:
    """After its process is killed or its pod is replaced, the driver issues 0 certificates again and still rotates."""
    before, registrations = _state(), _registrations(logs)
    pod = host.driver()
    if how == "SIGKILL":
        os.kill(host.process_of(pod), signal.SIGKILL)
    else:
        cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "pod", pod["metadata"]["name"])
    _wait_for_recovery(logs, registrations)
    _wait_for_rotation()
    assert _state() == before
    _assert_issued_once(logs)
    _assert_one_mount_each()


@pytest.mark.timeout(240)
def test_kubelet_restarts_issue_no_certificate_again(logs: LogCollector) -> None:
    """The kubelet republishes all volumes after each of three restarts: one mount each, and 0 certificates issued again."""
    before = _state()
    for _ in range(3):
        registrations = _registrations(logs)
        restart_kubelet()
        _wait_for_recovery(logs, registrations)
    _assert_one_mount_each()
    assert _state() == before
    _assert_issued_once(logs)


@pytest.mark.timeout(300)
def test_renewal_waits_for_an_unavailable_authority(logs: LogCollector) -> None:
    """During an outage of the authority a pod keeps its files past a due renewal. Within a minute after it, they are renewed."""
    before = _state()
    driver = host.driver()

    def failures() -> int:
        pod = str(SHORT_LIVED)
        return sum(event["event"] == "renewal failed" and event.get("pod") == pod for event in logs.events(DRIVER))

    failed = failures()
    with cluster.stopped_authority():
        files = SHORT_LIVED.read("site.pem")
        # A renewal that is sent just before the outage waits 90 s for its response.
        cluster.wait_until(lambda: failures() > failed, seconds=120, what="a failed renewal")
        _wait_for_republish()
        assert metric(driver, "certmount_node_volumes_unhealthy") >= 1
        assert SHORT_LIVED.read("site.pem") == files
        assert len(mounts_at(target_path(SHORT_LIVED.uid))) == 1
    cluster.wait_until(lambda: SHORT_LIVED.read("site.pem") != files, seconds=60, what="a renewal after the outage")
    cluster.wait_until(
        lambda: not metric(driver, "certmount_node_volumes_unhealthy"), seconds=60, what="healthy volumes"
    )
    assert SHORT_LIVED.restarts() == 0
    assert _state() == before


@pytest.mark.timeout(300)
def test_forty_pods_start_although_a_replica_dies_and_leave_nothing(logs: LogCollector) -> None:
    """The replica that issues dies, and none of forty starting pods sees a failure. Deleted together, they leave nothing."""
    names = [f"many-{number}" for number in range(MANY)]

    def issued() -> list[dict[str, Any]]:
        return [event for event in logs.issued() if str(event.get("pod")).startswith("many-")]

    earlier = len(issued())
    processes = {pod["metadata"]["name"]: host.process_of(pod) for pod in host.authorities()}
    with ThreadPoolExecutor(1) as thread:
        # In another thread, because the authority issues the first certificates before kubectl has created the last pod.
        applied = thread.submit(
            cluster.apply, *(manifest(Pod(NAMESPACE, name), {}, labels={"app": "many"}) for name in names)
        )
        first = cluster.wait_until(lambda: issued()[earlier:], seconds=60, pause=0.02, what="the first certificates")
        (victim,) = [process for name, process in processes.items() if name in first[-1]["file"]]
        os.kill(victim, signal.SIGKILL)
        issued_before = len(issued()) - earlier
        applied.result()
    cluster.wait_for("Ready", "pod", "-l", "app=many", namespace=NAMESPACE, seconds=120)
    assert issued_before < MANY / 2, "the replica died too late to matter"
    failures = cluster.find("events", "--field-selector", "reason=FailedMount", namespace=NAMESPACE)
    assert [event["message"] for event in failures if event["involvedObject"]["name"] in names] == []

    pods = cluster.find("pods", "-l", "app=many", namespace=NAMESPACE)
    directories = {uid: volume_directory(uid) for uid in (pod["metadata"]["uid"] for pod in pods)}
    assert len(directories) == MANY
    begin = time.monotonic()
    cluster.kubectl("-n", NAMESPACE, "delete", "pods", "-l", "app=many", "--wait=false")
    cluster.wait_for("delete", "pod", "-l", "app=many", namespace=NAMESPACE, seconds=90)
    cluster.wait_until(
        lambda: not any(leftovers_of(uid, directory) for uid, directory in directories.items()),
        seconds=60,
        what="no leftovers of forty pods",
    )
    print(f"{MANY} pods were deleted without leftovers after {time.monotonic() - begin:.1f} s")


@pytest.mark.timeout(240)
def test_pod_gets_a_new_certificate_after_a_reboot() -> None:
    """A reboot removes all mounts. The first command of the restarted pod finds the files of a new certificate."""
    pod = Pod(NAMESPACE, "rebooted")
    check = f"grep -q -e '-----END' {TLS}/site.key && grep -q -e '-----END' {TLS}/site.crt || exit 1"
    command = ["/bin/sh", "-c", f"{check}; trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"]
    rebooted = manifest(pod, {}, command=command)
    rebooted["spec"]["restartPolicy"] = "Always"
    cluster.apply(rebooted)
    pod.wait_until_ready()
    before, uid = pod.read("site.crt"), pod.uid
    host.reboot()
    cluster.wait_until(lambda: pod.restarts() > 0, seconds=90, what="the pod runs again")
    pod.wait_until_ready()
    assert (pod.uid, pod.restarts()) == (uid, 1)
    assert pod.read("site.crt") != before
    assert len(mounts_at(target_path(uid))) == len(mounts_at(volume_directory(uid))) == 1
    cluster.wait_for_rollout("deployment/certmount-authority", "daemonset/certmount-node")
