"""``certmount doctor``: each defect of an installation is found, with a fix that works."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.integration.doctor.world import (
    AUTHORITY_POD,
    NODE,
    NODE_POD,
    POLICY,
    Installation,
    changed,
    set_ready,
)
from tests.support.scripted_authority import TestCA
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="package")
RBAC = "/apis/rbac.authorization.k8s.io/v1"
NAMESPACE = "/api/v1/namespaces/certmount"
DAEMON_SET = "/apis/apps/v1/namespaces/certmount/daemonsets/certmount-node"
CSI_NODE = f"/apis/storage.k8s.io/v1/csinodes/{NODE}"
PATCH = "kubectl patch csidriver csi.certmount.dev --type=merge -p"
CHECKS = [
    "api server", "namespace", "csi driver", "workloads", "kubelet directory", "permissions", "network policies",
    "admission policy", "policy", "roots", "programs", "authority", "versions",
]  # fmt: skip


def finding(check: str, problem: str, fix: str, severity: str = "error") -> dict[str, str]:
    return {"severity": severity, "check": check, "problem": problem, "fix": fix}


async def test_healthy_installation_has_no_findings(installation: Installation) -> None:
    result = installation.run("doctor")
    assert (result.status, result.errors) == (0, ""), result.output
    lines = result.output.splitlines()
    assert [line[:26].rstrip() for line in lines[:-1]] == [f"ok      {check}" for check in CHECKS]
    assert lines[-1] == "0 errors, 0 warnings, 0 not checked"
    document = installation.run("doctor", "-o", "json").document
    assert (document["healthy"], [check["check"] for check in document["checks"]]) == (True, CHECKS)


async def test_fields_of_the_csi_driver(installation: Installation) -> None:
    path = "/apis/storage.k8s.io/v1/csidrivers/csi.certmount.dev"
    with changed(installation, path, {"spec": {"podInfoOnMount": False, "tokenRequests": [{"audience": "vault"}]}}):
        found = await installation.findings()
        requests = '{"spec": {"tokenRequests": [{"audience": "certmount", "expirationSeconds": 3600}]}}'
        assert found == [
            finding(
                "csi driver",
                "spec.podInfoOnMount is false; expected true",
                f'{PATCH} \'{{"spec": {{"podInfoOnMount": true}}}}\'',
            ),
            finding(
                "csi driver", "spec.tokenRequests has no token for the audience 'certmount'", f"{PATCH} '{requests}'"
            ),
        ]
        for each in found:
            installation.shell(each["fix"])
        assert await installation.findings() == []


async def test_namespace_that_forbids_the_driver(installation: Installation) -> None:
    label = "pod-security.kubernetes.io/enforce"
    with changed(installation, NAMESPACE, {"metadata": {"labels": {label: "baseline"}}}):
        (found,) = await installation.findings()
        problem = f"the label {label} is 'baseline', which forbids the driver's privileged pods"
        fix = f"kubectl label --overwrite namespace certmount {label}=privileged"
        assert found == finding("namespace", problem, fix)
        installation.shell(found["fix"])
        assert await installation.findings() == []


@pytest.mark.parametrize("kind", ["clusterroles", "namespaces/certmount/roles"])
async def test_missing_rule_of_the_authority(installation: Installation, kind: str) -> None:
    path = f"{RBAC}/{kind}/certmount-authority"
    rules = installation.api.call("GET", path)["rules"]
    resource = "namespaces" if kind == "clusterroles" else "configmaps"
    rest = [{**rule, "resources": [each for each in rule["resources"] if each != resource]} for rule in rules]
    with changed(installation, path, {"rules": [rule for rule in rest if rule["resources"]]}):
        found = [each for each in await installation.findings() if each["check"] == "permissions"]
        if kind == "clusterroles":
            value = '[{"op": "add", "path": "/rules/-", "value": {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["list", "watch"]}}]'
            problem = "the service account certmount/certmount-authority cannot list, watch namespaces"
            assert found == [
                finding(
                    "permissions", problem, f"kubectl patch clusterrole certmount-authority --type=json -p '{value}'"
                )
            ]
        else:
            (one,) = found
            text = "the service account certmount/certmount-authority cannot get, update configmaps certmount/certmount-root"
            assert one["problem"] == text
            assert one["fix"].startswith("kubectl -n certmount patch role certmount-authority --type=json -p '")
        installation.shell(found[0]["fix"])
        assert await installation.findings() == []


async def test_missing_binding_of_the_authority(installation: Installation) -> None:
    path = f"{RBAC}/clusterrolebindings/certmount-authority"
    subject = {"kind": "ServiceAccount", "name": "other", "namespace": "certmount"}
    with changed(installation, path, {"subjects": [subject]}):
        (found,) = await installation.findings()
        problem = "lacks 18 of 26 permissions, such as create tokenreviews.authentication.k8s.io"
        assert found["problem"] == f"the service account certmount/certmount-authority {problem}"
        assert "its roles or their bindings are missing" in found["fix"]


async def test_driver_with_permissions_is_a_warning(installation: Installation) -> None:
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    subject = {"kind": "ServiceAccount", "name": "certmount-node", "namespace": "certmount"}
    binding = {"metadata": {"name": "too-much"}, "roleRef": role, "subjects": [subject]}
    installation.api.call("POST", f"{RBAC}/clusterrolebindings", binding)
    try:
        found = await installation.findings()
        assert {(each["severity"], each["check"]) for each in found} == {("warning", "permissions")}
        assert found[0]["problem"] == (
            "the driver's service account certmount/certmount-node can get secrets, and needs no permission at all"
        )
        assert installation.run("doctor").status == 0
    finally:
        installation.api.call("DELETE", f"{RBAC}/clusterrolebindings/too-much")


async def test_invalid_policy_and_issuers_in_config_maps(installation: Installation) -> None:
    policy = "policy:\n- allow: {dns: [1], colour: red}\n"
    issuers = "issuers:\n- name: UPPER\n  vault: {}\n"
    with (
        changed(installation, f"{NAMESPACE}/configmaps/certmount-policy", {"data": {"policy.yaml": policy}}),
        changed(installation, f"{NAMESPACE}/configmaps/certmount-issuers", {"data": {"issuers.yaml": issuers}}),
    ):
        found = await installation.findings()
    assert {each["fix"] for each in found} == {
        "kubectl -n certmount edit configmap certmount-policy",
        "kubectl -n certmount edit configmap certmount-issuers",
    }
    problems = [each["problem"] for each in found]
    assert any(text.startswith("ConfigMap certmount-policy: policy.yaml: ") and "colour" in text for text in problems)
    assert any("dns[0]" in text for text in problems), problems
    assert any(text.startswith("ConfigMap certmount-issuers: issuers.yaml: ") for text in problems)


async def test_policy_that_the_authority_rejects(installation: Installation) -> None:
    """The mounted file is invalid: the previous policy stays in force, and pods see no failure yet."""
    (installation.files / "policy.yaml").write_text("policy: 1\n")
    try:
        (found,) = await installation.findings()
        fix = f"kubectl -n certmount exec {AUTHORITY_POD} -- certmount policy check"
        assert (found["check"], found["fix"]) == ("authority", fix)
        assert found["problem"].startswith(f"{AUTHORITY_POD}: policy: InvalidPolicy: ")
    finally:
        (installation.files / "policy.yaml").write_text(POLICY)


async def test_issuer_that_cannot_be_reached(installation: Installation) -> None:
    key = installation.files / "jwk.json"
    key.write_text("{}")
    declared = f"issuers:\n- name: step\n  step_ca:\n    url: https://127.0.0.1:1\n    root_sha256: {'0' * 64}\n"
    declared += f"    provisioner: certmount\n    key: {{file: {key}}}\n"
    file = installation.files / "issuers.yaml"
    file.write_text(declared)
    try:

        def named() -> list[str]:
            return [each["name"] for each in installation.run("status", "-o", "json").document["issuers"]]

        await until(lambda: "step" in named(), "the new issuer")
        found = [
            each
            for each in await installation.findings()
            if each["problem"].startswith(f"{AUTHORITY_POD}: issuer step: ")
        ]
        assert found
        fix = f"kubectl -n certmount exec {AUTHORITY_POD} -- certmount issuer check step"
        assert {(each["check"], each["fix"]) for each in found} == {("authority", fix)}
        status = installation.run("status", "--problems")
        assert status.status == 1
        assert "  issuer step: " in status.output
    finally:
        file.write_text("issuers: []\n")
        await until(lambda: "step" not in named(), "the removal of the issuer")


async def test_published_roots(installation: Installation) -> None:
    path = f"{NAMESPACE}/configmaps/certmount-root"
    restart = "kubectl -n certmount rollout restart deployment certmount-authority"
    with changed(installation, path, {"data": {"root.crt": TestCA().pem.decode()}}):
        (found,) = await installation.findings()
        assert found["fix"] == restart
        assert re.fullmatch(
            r"the ConfigMap certmount-root lacks the root SHA256:\S+ of the CA that signs", found["problem"]
        )
    with changed(installation, path, {"data": {"authority.crt": ""}}):
        (found,) = await installation.findings()
        problem = "the ConfigMap certmount-root has no certificates in authority.crt; the authority writes them"
        assert found == finding("roots", problem, restart)


async def kubelet_findings(installation: Installation) -> list[dict[str, str]]:
    return [each for each in await installation.findings() if each["check"] == "kubelet directory"]


async def test_wrong_kubelet_directory(installation: Installation) -> None:
    """The manifests have the default directory, and the kubelet uses another one, so it does not know the driver."""
    replace = "kubectl -n certmount get daemonset certmount-node -o yaml | sed 's#{}#{}#g' | kubectl replace -f -"
    with changed(installation, CSI_NODE, {"spec": {"drivers": []}}):
        (found,) = await kubelet_findings(installation)
        problem = f"{NODE}: the kubelet has not registered the driver: is /var/lib/kubelet its --root-dir"
        fix = replace.format("/var/lib/kubelet", "KUBELET_ROOT_DIR")
        assert found == finding("kubelet directory", problem, fix)
        labels = {"metadata": {"labels": {"microk8s.io/cluster": "true"}}}
        with changed(installation, f"/api/v1/nodes/{NODE}", labels):
            (found,) = await kubelet_findings(installation)
            directory = "/var/snap/microk8s/common/var/lib/kubelet"
            problem = f"{NODE}: the DaemonSet uses /var/lib/kubelet, but the kubelet's directory is {directory}"
            assert found["problem"] == problem
        try:
            for separator in (":", ": ", " ", "="):
                installation.kubelet.flags = (
                    f"\nkubelet flagz\nroot-dir{separator}/data/kubelet\nrunonce{separator}false\n"
                )
                (found,) = await kubelet_findings(installation)
                assert found["problem"].endswith("but the kubelet's directory is /data/kubelet")
            with changed(installation, DAEMON_SET, {"metadata": {"annotations": {"test": "1"}}}):
                assert found["fix"] == replace.format("/var/lib/kubelet", "/data/kubelet")
                installation.shell(found["fix"])
                (found,) = await kubelet_findings(installation)
                problem = "the kubelet has not registered the driver, although its directory is /data/kubelet"
                fix = f"kubectl -n certmount logs {NODE_POD}"
                assert found == finding("kubelet directory", f"{NODE}: {problem}", fix)
        finally:
            installation.kubelet.flags = ""
    assert await installation.findings() == []


async def test_volume_of_the_driver_with_another_host_path(installation: Installation) -> None:
    volumes = installation.api.call("GET", DAEMON_SET)["spec"]["template"]["spec"]["volumes"]
    wrong = [{**each, "hostPath": {"path": "/data"}} if each["name"] == "kubelet" else each for each in volumes]
    with changed(installation, DAEMON_SET, {"spec": {"template": {"spec": {"volumes": wrong}}}}):
        (found,) = await installation.findings()
        assert found["problem"] == (
            "--kubelet-dir is /var/lib/kubelet, but the volume has the host path /data; they must be equal"
        )
        installation.shell(found["fix"])
        assert await installation.findings() == []


async def test_pod_of_the_driver_that_does_not_start(installation: Installation) -> None:
    text = 'MountVolume.SetUp failed for volume "kubelet" : hostPath type check failed: /var/lib/kubelet is not a directory'
    event = {
        "metadata": {"generateName": "e-"},
        "involvedObject": {"kind": "Pod", "name": NODE_POD, "namespace": "certmount"},
        "type": "Warning",
        "reason": "FailedMount",
        "message": text,
    }
    created = installation.api.call("POST", f"{NAMESPACE}/events", event)
    set_ready(installation, NODE_POD, "node", waiting={"reason": "ContainerCreating"})
    installation.patch(f"{DAEMON_SET}/status", {"status": {"numberReady": 0}})
    try:
        result = installation.run("doctor")
        assert result.status == 1
        cause = f"the container is not running: ContainerCreating; FailedMount: {text}"
        assert f"error   workloads          {NODE}: a pod of the node driver is not ready: {cause}\n" in result.output
        assert f"                           fix: kubectl -n certmount describe pod {NODE_POD}\n" in result.output
    finally:
        set_ready(installation, NODE_POD, "node")
        installation.patch(f"{DAEMON_SET}/status", {"status": {"numberReady": 1}})
        installation.api.call("DELETE", f"{NAMESPACE}/events/{created['metadata']['name']}")


async def test_pods_that_have_ended_are_no_problem(installation: Installation) -> None:
    """For example pods that a node evicted; the Deployment has replaced them."""
    template = installation.api.call("GET", f"{NAMESPACE}/pods/{AUTHORITY_POD}")
    metadata = {"name": "certmount-authority-evicted", "labels": template["metadata"]["labels"]}
    installation.api.call("POST", f"{NAMESPACE}/pods", {"metadata": metadata, "spec": template["spec"]})
    path = f"{NAMESPACE}/pods/{metadata['name']}"
    installation.patch(f"{path}/status", {"status": {"phase": "Failed", "reason": "Evicted"}})
    try:
        assert await installation.findings() == []
        assert installation.run("status").status == 0
    finally:
        installation.api.call("DELETE", f"{path}?gracePeriodSeconds=0")


async def test_scaled_down_authority(installation: Installation) -> None:
    path = "/apis/apps/v1/namespaces/certmount/deployments/certmount-authority"
    with changed(installation, path, {"spec": {"replicas": 0}}):
        (found,) = await installation.findings()
        fix = 'kubectl -n certmount patch deployment certmount-authority --type=merge -p \'{"spec":{"replicas":2}}\''
        assert found == finding("workloads", "the authority has no pods", fix)


async def test_driver_without_the_authority(installation: Installation) -> None:
    """The driver's own view: its name resolves, and nothing listens."""
    await installation.driver.stop()
    try:
        found = await installation.findings()
        assert {(each["severity"], each["check"]) for each in found} == {
            ("unknown", "programs"),
            ("unknown", "versions"),
        }
        assert "error forwarding port 9440 to pod" in found[0]["problem"]
        assert found[0]["fix"] == f"kubectl -n certmount port-forward {NODE_POD} 9440"
        assert installation.run("doctor").status == 1
    finally:
        await installation.driver.start()
        await installation.driver_kubelet.register()


@contextmanager
def page_of_node(installation: Installation, page: bytes) -> Iterator[None]:
    """Let another program answer for the node driver: an older version, or a compromised one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            pass

    before = installation.kubelet.ports[NODE_POD]
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        installation.kubelet.ports[NODE_POD] = server.server_port
        try:
            yield
        finally:
            installation.kubelet.ports[NODE_POD] = before
            server.shutdown()
            thread.join()


async def test_versions_that_differ_by_two(installation: Installation) -> None:
    page = {"version": "0.3.1", "time": time.time(), "problems": [], "authority": "x is at 10.0.0.1"}
    with page_of_node(installation, json.dumps(page).encode()):
        (found,) = await installation.findings()
    assert found["problem"] == (
        f"this command has version 0.1.0, and {NODE_POD} has 0.3.1; one minor version of difference works"
    )


async def test_clock_of_a_node(installation: Installation) -> None:
    page = {"version": "0.1.0", "time": time.time() - 300, "problems": [], "authority": ""}
    with page_of_node(installation, json.dumps(page).encode()):
        (found,) = await installation.findings()
    assert found["problem"] == f"the clocks of this machine and node {NODE} differ by about 5 min; synchronize them"


@pytest.mark.parametrize(
    "page, expected",
    [
        (b"[" * 100_000, "sends a page /diagnostics that is not valid"),
        (b"{}", "sends a page /diagnostics that is not valid"),
        (b" " * (9 << 20), "sent more than 8388608 bytes"),
    ],
    ids=["nested", "empty", "large"],
)
async def test_page_of_a_compromised_node(installation: Installation, page: bytes, expected: str) -> None:
    with page_of_node(installation, page):
        found = await installation.findings()
    assert expected in found[0]["problem"]


async def test_text_of_a_compromised_node_cannot_control_the_terminal(installation: Installation) -> None:
    page = {"version": "0.1.0", "time": time.time(), "problems": ["\x1b[2Jall is well\n"], "authority": ""}
    with page_of_node(installation, json.dumps(page).encode()):
        result = installation.run("doctor")
    assert f"{NODE}: \\x1b[2Jall is well\\n\n" in result.output


async def test_missing_network_policy(installation: Installation) -> None:
    path = "/apis/networking.k8s.io/v1/namespaces/certmount/networkpolicies"
    before = installation.api.call("GET", f"{path}/certmount-node")
    installation.api.call("DELETE", f"{path}/certmount-node")
    try:
        (found,) = await installation.findings()
        problem = "no NetworkPolicy selects the pods of certmount-node, so every pod can connect to them"
        assert (found["severity"], found["problem"]) == ("warning", problem)
        installation.shell(found["fix"])
        assert await installation.findings() == []
    finally:
        assert installation.api.call("GET", f"{path}/certmount-node")["spec"] == before["spec"]


async def test_admission_policy_of_pod_certificates(installation: Installation) -> None:
    deployment = "/apis/apps/v1/namespaces/certmount/deployments/certmount-authority"
    policies, name = "/apis/admissionregistration.k8s.io/v1", "certmount-pod-certificates"
    policy, binding = (f"{policies}/validatingadmissionpolic{end}/{name}" for end in ("ies", "ybindings"))
    container = installation.api.call("GET", deployment)["spec"]["template"]["spec"]["containers"][0]
    container["args"] = [*container["args"], "--pod-signer=certmount.dev/pod=internal"]

    async def found() -> list[dict[str, str]]:
        return [each for each in await installation.findings() if each["check"] == "admission policy"]

    with changed(installation, deployment, {"spec": {"template": {"spec": {"containers": [container]}}}}):
        try:
            (missing,) = await found()
            assert missing["severity"] == "error"
            assert f"the ValidatingAdmissionPolicy {name} does not exist" in missing["problem"]
            installation.shell(missing["fix"])
            assert await found() == []
            for path, change, expected in (
                (binding, {"validationActions": ["Audit"]}, "does not deny requests"),
                (policy, {"failurePolicy": "Ignore"}, "ignores its errors"),
            ):
                installation.patch(path, {"spec": change})
                (weak,) = await found()
                assert expected in weak["problem"]
                installation.shell(weak["fix"])
                assert await found() == []
        finally:
            for path in (policy, binding):
                installation.api.call("DELETE", path)


async def test_user_without_permissions_gets_findings_and_no_crash(installation: Installation) -> None:
    result = installation.run("doctor", user="jane")
    assert (result.status, result.errors) == (1, "")
    assert result.output.splitlines()[-1] == "0 errors, 0 warnings, 12 not checked"
    text = "not checked: you do not have the permission to get /api/v1/namespaces/certmount"
    assert f"unknown namespace          {text}" in result.output


async def test_nothing_is_installed(installation: Installation) -> None:
    result = installation.run("doctor", "--namespace=elsewhere")
    assert result.status == 1
    assert result.output.splitlines()[1:] == [
        "error   namespace          the namespace elsewhere does not exist",
        "                           fix: install certmount, or name its namespace: the section Install of README.md; certmount doctor --namespace=NAMESPACE",
        "1 error, 0 warnings, 0 not checked",
    ]


async def test_wrong_credentials_and_a_missing_kubeconfig(installation: Installation) -> None:
    result = installation.run("doctor", user="unknown")
    assert result.status == 1
    assert "not checked: the API server rejects your credentials" in result.output
    result = installation.run("doctor", "--context=missing")
    assert result.status == 1
    assert result.errors.startswith("Error: APIServerUnavailable: kubeconfig: ")
