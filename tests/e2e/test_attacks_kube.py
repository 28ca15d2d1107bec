"""A tenant fills its namespace with large objects: the authority stays small, and other tenants get certificates."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import cluster, host
from tests.e2e.pods import BUSYBOX, Pod, manifest

ATTACK, VICTIM = "e2e-attack-objects", "e2e-attack-victim"
PODS = 250
ANNOTATION_BYTES = 250 * 1024
READY_S = 15.0
MAX_PEAK_MIB = 200.0
_AUTHORITY = ("-l", "app.kubernetes.io/name=certmount-authority")


def _pending(number: int, **metadata: Any) -> Any:
    """Return a pod that no node can run."""
    container = {"name": "app", "image": BUSYBOX, "imagePullPolicy": "Never"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"large-{number}", "namespace": ATTACK, **metadata},
        "spec": {"nodeSelector": {"certmount.dev/e2e": "nowhere"}, "containers": [container]},
    }


def _create(pods: list[Any]) -> None:
    """Create pods. ``kubectl apply`` would store each a second time in an annotation."""
    for start in range(0, len(pods), 25):
        items = {"apiVersion": "v1", "kind": "List", "items": pods[start : start + 25]}
        cluster.kubectl("create", "-f", "-", text=json.dumps(items), seconds=120)


def _ready_authorities() -> list[Any]:
    """Return both replicas if both are ready and not being deleted."""
    ready = [
        pod
        for pod in cluster.find("pods", *_AUTHORITY, namespace=cluster.CERTMOUNT)
        if "deletionTimestamp" not in pod["metadata"]
        and any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", ()))
    ]
    return ready if len(ready) == 2 else []


def _peak_mib(pod: Any) -> float:
    status = Path(f"/proc/{host.process_of(pod)}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _restart_all() -> tuple[list[Any], float]:
    """Delete all replicas at once; return the new ones and the seconds until they are ready."""
    old = {pod["metadata"]["uid"] for pod in cluster.find("pods", *_AUTHORITY, namespace=cluster.CERTMOUNT)}
    start = time.monotonic()
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "pod", *_AUTHORITY, "--grace-period=1", "--wait=false")

    def replaced() -> list[Any]:
        ready = _ready_authorities()
        return ready if not old & {pod["metadata"]["uid"] for pod in ready} else []

    return cluster.wait_until(
        replaced, seconds=120, what="both new replicas of the authority are ready"
    ), time.monotonic() - start


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> Iterator[None]:
    cluster.create_namespace(ATTACK)
    cluster.create_namespace(VICTIM)
    yield
    cluster.delete_namespace(ATTACK, VICTIM)


def _publish_seconds(name: str) -> float:
    """Return the seconds until another tenant's new pod with a certificate is ready."""
    pod, start = Pod(VICTIM, name), time.monotonic()
    cluster.apply(manifest(pod, {}))
    pod.wait_until_ready(60)
    assert pod.certificate().serial_number
    return time.monotonic() - start


def test_large_annotations_do_not_stop_the_authority() -> None:
    quiet, quiet_s = _restart_all()
    quiet_mib = max(map(_peak_mib, quiet))
    before_s = _publish_seconds("before")
    _create([_pending(number, annotations={"a": "x" * ANNOTATION_BYTES}) for number in range(PODS)])
    created_mib = max(map(_peak_mib, _ready_authorities()))

    replicas, ready_s = _restart_all()
    during_s = _publish_seconds("during")

    peak_mib = max(map(_peak_mib, replicas))
    print(
        f"ready after {ready_s:.1f} s (quiet {quiet_s:.1f} s); peak {peak_mib:.0f} MiB (quiet {quiet_mib:.0f} MiB, "
        f"{created_mib:.0f} MiB while the pods were created); victim {during_s:.1f} s (quiet {before_s:.1f} s)"
    )
    assert ready_s < READY_S
    assert max(peak_mib, created_mib) < MAX_PEAK_MIB
    assert [host.restarts(pod) for pod in _ready_authorities()] == [0, 0]
    assert during_s < 2 * before_s + 1


def test_pod_with_too_many_labels_is_refused_with_words() -> None:
    labels = {f"label-{number}": "x" for number in range(129)}
    pod = Pod(ATTACK, "labels")
    cluster.apply(manifest(pod, {}, labels=labels))
    # The authority's event comes first, because the driver retries during the kubelet's call.
    refusal = f"pod {pod}: has more than 128 labels, so certmount ignores it; use at most 128"
    cluster.wait_until(
        lambda: [event for event in cluster.events_of(pod.name, ATTACK) if refusal in str(event.get("message"))],
        seconds=60,
        what="an event with the refusal",
    )
    assert _publish_seconds("after") < 30
