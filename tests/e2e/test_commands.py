"""``certmount status``, ``doctor`` and ``inspect`` with the kubeconfig of an administrator: what they find, and that the fixes work."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e import cluster, host
from tests.e2e.pods import Pod, manifest
from tests.support.documentation import documented

NAMESPACE = "e2e-commands"
POD = Pod(NAMESPACE, "app")
NAME = f"app.{NAMESPACE}.svc"
MISSING = "/var/lib/kublet"  # a kubelet directory with a typing error
PORTS = {"certmount-node": 9440, "certmount-authority": 9441}


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    cluster.create_namespace(NAMESPACE)
    cluster.apply(manifest(POD, {"dns-names": NAME}))
    POD.wait_until_ready()
    yield
    cluster.delete_namespace(NAMESPACE)


def certmount(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "csi_driver.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def findings(check: str = "") -> list[dict[str, str]]:
    _, output = certmount("doctor", "--output=json")
    found = [finding for each in json.loads(output)["checks"] for finding in each["findings"]]
    return [finding for finding in found if check in ("", finding["check"])]


def apply_fix(fix: str) -> None:
    done = subprocess.run(["bash", "-ec", f"set -o pipefail; {fix}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def wait_until_healthy(seconds: float = 90) -> None:
    cluster.wait_until(lambda: not findings(), seconds=seconds, what="no findings")


def test_healthy_installation_has_no_findings() -> None:
    status, output = certmount("doctor")
    print(output)
    assert status == 0, output
    assert output.splitlines()[-1] == "0 errors, 0 warnings, 0 not checked"


def test_documented_command_checks_the_running_authority() -> None:
    command = documented("README.md", "kubectl -n certmount exec deploy/certmount-authority")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}


def test_status_and_inspect_show_the_certificate_of_a_pod() -> None:
    serial = f"{POD.certificate().serial_number:x}"
    status, output = certmount("status", str(POD))
    print(output)
    assert status == 0, output
    row = output.splitlines()[-1].split("\t")
    assert row[:4] == [NAMESPACE, "app", "tls", "ok"]
    assert (row[6], row[7], row[9]) == ("internal", host.NODE, serial)
    status, output = certmount("inspect", str(POD))
    print(output)
    assert status == 0, output
    # The command runs as root on the node, so it also reads the files.
    assert f"  serial        {serial}\n" in output
    assert f"  a client that connects to {NAME} accepts it\n" in output


@pytest.mark.parametrize("component", PORTS)
def test_tenant_cannot_read_the_state_of_others(component: str) -> None:
    """The cluster's network plugin enforces no NetworkPolicy, so the pod can connect to the port."""
    for target in host.pods_of(component):
        address = f"{target['status']['podIP']}:{PORTS[component]}"
        assert "certmount_" in POD.run("wget", "-q", "-O", "-", f"http://{address}/metrics")
        for path in ("/status", "/diagnostics"):
            with pytest.raises(cluster.KubectlError, match="403 Forbidden"):
                POD.run("wget", "-q", "-O", "-", f"http://{address}{path}")


def test_broken_policy() -> None:
    with cluster.restored_configuration():
        cluster.patch_config_map(
            "certmount-policy", {"policy.yaml": "policy:\n- allow: {dns: [1.example.com], colour: red}\n"}
        )
        found = findings("policy")
        print(found)
        assert {each["fix"] for each in found} == {"kubectl -n certmount edit configmap certmount-policy"}
        assert any(each["problem"].startswith("ConfigMap certmount-policy: policy.yaml: ") for each in found)
        assert any("colour" in each["problem"] for each in found)
        assert certmount("doctor")[0] == 1
    wait_until_healthy()


def test_missing_rule() -> None:
    role = cluster.get("clusterrole", "certmount-authority")
    number = next(number for number, rule in enumerate(role["rules"]) if "namespaces" in rule["resources"])
    resources = [each for each in role["rules"][number]["resources"] if each != "namespaces"]
    change = [{"op": "replace", "path": f"/rules/{number}/resources", "value": resources}]
    cluster.kubectl("patch", "clusterrole", "certmount-authority", "--type=json", "-p", json.dumps(change))
    (found,) = findings("permissions")
    print(found)
    assert found["problem"] == "the service account certmount/certmount-authority cannot list, watch namespaces"
    apply_fix(found["fix"])
    wait_until_healthy()


@contextlib.contextmanager
def wrong_kubelet_directory() -> Iterator[None]:
    def replace(old: str, new: str) -> None:
        text = json.dumps(cluster.get("daemonset", "certmount-node"))
        cluster.kubectl("replace", "-f", "-", text=text.replace(f'{old}"', f'{new}"'))

    replace(str(host.KUBELET), MISSING)
    try:
        yield
    finally:
        replace(MISSING, str(host.KUBELET))
        cluster.wait_for_rollout("daemonset/certmount-node")


def test_wrong_kubelet_directory() -> None:
    """The new pod does not start, and the old one is stopped for it: the fix starts the driver again."""
    with wrong_kubelet_directory():

        def found() -> Any:
            each = {finding["check"]: finding for finding in findings()}
            kubelet, workloads = each.get("kubelet directory"), each.get("workloads")
            return each if kubelet and workloads and "FailedMount" in workloads["problem"] else None

        each = cluster.wait_until(found, seconds=90, what="the findings")
        print(each)
        assert MISSING in each["workloads"]["problem"]
        kubelet = each["kubelet directory"]
        assert kubelet["fix"] == (
            f"kubectl -n certmount get daemonset certmount-node -o yaml | sed 's#{MISSING}#{host.KUBELET}#g' | kubectl replace -f -"
        )
        apply_fix(kubelet["fix"])
        cluster.wait_for_rollout("daemonset/certmount-node")
        wait_until_healthy()
    assert POD.read("site.crt")
