"""The health of volumes as a real kubelet reports it (Kubernetes 1.37 with the feature gate CSIVolumeHealth)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from csi_driver import DRIVER_NAME
from tests.e2e import cluster
from tests.e2e.pods import Pod, pod_to_deny
from tests.support.documentation import documented

NAMESPACE = "e2e-volume-health"
POD = Pod(NAMESPACE, "unhealthy")  # the driver renews its certificate about every 40 seconds
NODE = "node1"
METRIC = f'csi_node_storage_health_status{{driver_name="{DRIVER_NAME}",reason="ServiceAccountDenied",status="StorageDegraded"}} 1'


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    version = json.loads(cluster.kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    if int(version.split(".")[1]) < 37:
        pytest.skip(f"needs Kubernetes 1.37 or newer for the health of volumes; this is {version}")
    with pod_to_deny(POD):
        yield


@pytest.mark.timeout(400)
def test_kubelet_reports_why_renewals_fail_until_they_succeed() -> None:
    """In CSINode and as a metric, for all volumes of the driver: up to 1.37, Pod.status has the health of persistent volumes only."""
    cluster.wait_until(lambda: _conditions() == [], seconds=60, what="no problem before")
    entry = {"match": {"namespaces": [NAMESPACE], "serviceAccounts": ["default"]}, "reason": "its key was in a log"}
    cluster.change_policy(lambda policy: policy.update(deny=[entry]))
    (condition,) = cluster.wait_until(_conditions, seconds=150, what="the condition in the status of CSINode")
    assert (condition["status"], condition["reason"]) == ("StorageDegraded", "ServiceAccountDenied")
    assert "volumes on this node, such as: the renewal of the certificate of pod" in condition["message"]
    assert str(POD) in condition["message"]
    assert "its key was in a log" in condition["message"]
    assert METRIC in _kubelet_metrics()
    assert "volumeHealth" not in POD.get()["status"], (
        "the kubelet asks for inline volumes: document it in docs/metrics.md"
    )

    cluster.change_policy(lambda policy: policy.pop("deny"))
    cluster.wait_until(lambda: _conditions() == [], seconds=150, what="a renewal once it is allowed")
    cluster.wait_until(lambda: METRIC not in _kubelet_metrics(), seconds=30, what="the metric without the problem")


def _conditions() -> list[Any]:
    """Return the conditions that the command of the documentation prints."""
    _, *command = shlex.split(documented("docs/metrics.md", "kubectl get csinode").replace("NODE", NODE))
    found = json.loads(cluster.kubectl(*command) or "[]")
    return [condition for one in found if one["name"] == DRIVER_NAME for condition in one["healthConditions"]]


def _kubelet_metrics() -> str:
    return cluster.kubectl("get", "--raw", f"/api/v1/nodes/{NODE}/proxy/metrics")
