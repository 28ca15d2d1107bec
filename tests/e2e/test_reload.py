"""Reload signals on a real node, with the component that allows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import cluster
from tests.e2e.pods import Pod, manifest

COMPONENT = Path(__file__).parents[2] / "deploy" / "components" / "reload" / "kustomization.yaml"
NAMESPACE, OTHER = "e2e-reload", "e2e-reload-other"
DRIVER = "daemonset/certmount-node"
ATTRIBUTES = {"duration": "30s", "reload": "signal=HUP,process=sh"}  # renewed about every 20 seconds
SHELL = ("sh", "-c", "trap 'echo HUP' HUP; echo started; while :; do sleep 1 & wait $!; done")


@pytest.fixture(scope="module", autouse=True)
def component() -> Iterator[None]:
    """The component with one namespace, without kustomize, which would add it to the rest of deploy/."""
    component = yaml.safe_load(COMPONENT.read_text())
    metadata = {"name": component["configMapGenerator"][0]["name"], "namespace": cluster.CERTMOUNT}
    for namespace in (NAMESPACE, OTHER):
        cluster.create_namespace(namespace)
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"namespaces": NAMESPACE}})
    cluster.kubectl("-n", cluster.CERTMOUNT, "patch", DRIVER, "--type=json", "-p", component["patches"][0]["patch"])
    cluster.wait_for_rollout(DRIVER)
    yield
    cluster.delete_namespace(NAMESPACE, OTHER)
    cluster.kubectl("-n", cluster.CERTMOUNT, "rollout", "undo", DRIVER)
    cluster.wait_for_rollout(DRIVER)
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "configmap", metadata["name"])


def _pod(pod: Pod, attributes: dict[str, str], user: int = 1000) -> Any:
    return manifest(pod, attributes, command=SHELL, security={"runAsUser": user})


def test_process_of_the_pod_gets_the_signal_and_no_other() -> None:
    """The neighbors have processes with the same name, one of them with the process IDs of the host."""
    pod, neighbor, on_host = (Pod(NAMESPACE, name) for name in ("reloading", "neighbor", "on-host"))
    host = _pod(on_host, {})
    host["spec"]["hostPID"] = True
    cluster.apply(_pod(pod, ATTRIBUTES), _pod(neighbor, {}), host)
    for one in (pod, neighbor, on_host):
        one.wait_until_ready()
    cluster.wait_until(lambda: pod.logs().count("HUP") >= 2, seconds=90, what="two signals")
    assert [one.logs().split() for one in (neighbor, on_host)] == [["started"], ["started"]]
    assert pod.restarts() == neighbor.restarts() == on_host.restarts() == 0


def test_pod_gets_an_event_if_it_has_no_such_process() -> None:
    pod = Pod(NAMESPACE, "no-such-process")
    cluster.apply(_pod(pod, {**ATTRIBUTES, "reload": "signal=HUP,process=nginx"}))
    pod.wait_until_ready()
    events = cluster.wait_until(
        lambda: cluster.events_of(pod.name, NAMESPACE, reason="ReloadFailed"), seconds=90, what="the event"
    )
    expected = "no process in the containers of the pod has the name nginx; run: kubectl exec POD -- cat /proc/1/comm"
    assert expected in events[0]["message"]


def test_namespace_that_is_not_allowed() -> None:
    pod = Pod(OTHER, "not-allowed")
    cluster.apply(_pod(pod, ATTRIBUTES))
    expected = f"ReloadNotAllowed: volumeAttributes.reload: signals are not allowed in namespace {OTHER};"
    assert expected in cluster.wait_for_mount_failure(pod.name, OTHER)
