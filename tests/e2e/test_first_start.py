"""The first start: the authority creates its CA once, and applying the manifests again does not change it."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from cryptography import x509

from tests.e2e import authority, cluster, host
from tests.e2e.logs import AUTHORITY, LogCollector

NAMESPACE = "e2e-first-start"
REPLICAS = 4
CA_SAVED = "CA saved"  # the log event of a replica that has written the CA


def test_two_replicas_that_start_together_create_one_ca(logs: LogCollector) -> None:
    assert len([event for event in logs.events(AUTHORITY) if event["event"] == CA_SAVED]) == 1
    assert authority.secret_root() == authority.root()
    assert len(x509.load_pem_x509_certificates(authority.root())) == 1


def test_both_replicas_issue_under_the_same_ca() -> None:
    driver = host.driver()["metadata"]["name"]
    pod_token = authority.token("certmount-node", cluster.CERTMOUNT, driver, "certmount")
    node_token = authority.node_token()
    addresses = [f"{replica['status']['podIP']}:8443" for replica in host.authorities()]
    results = [authority.issue(pod_token, node_token, address=address) for address in addresses]
    assert [result.reason for result in results] == ["", ""]
    assert len({result.roots for result in results}) == 1
    assert len({result.leaf.issuer for result in results if result.leaf}) == 1


def _second_installation() -> list[dict[str, Any]]:
    """Return the manifests of a second authority, whose replicas all find an empty Secret."""
    spec = cluster.get("deployment", "certmount-authority")["spec"]
    spec["replicas"] = REPLICAS
    container = spec["template"]["spec"]["containers"][0]
    for name in ("certmount-ca", "certmount-root"):
        container["args"] = [
            each.replace(f"={cluster.CERTMOUNT}/{name}", f"={NAMESPACE}/{name}") for each in container["args"]
        ]

    def item(kind: str, name: str = AUTHORITY, version: str = "v1", **fields: Any) -> dict[str, Any]:
        return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, **fields}

    rbac = "rbac.authorization.k8s.io"
    subjects = [{"kind": "ServiceAccount", "name": AUTHORITY, "namespace": NAMESPACE}]
    role, cluster_role = ({"apiGroup": rbac, "name": AUTHORITY, "kind": kind} for kind in ("Role", "ClusterRole"))
    return [
        item("Secret", "certmount-ca"),
        item("Secret", "certmount-acknowledgements"),
        item("Lease", "certmount-csr-signer", "coordination.k8s.io/v1"),
        item("ConfigMap", "certmount-root"),
        item("ConfigMap", "certmount-policy", data={"policy.yaml": ""}),
        item("ConfigMap", "certmount-issuers", data={"issuers.yaml": ""}),
        item("ServiceAccount"),
        item("Role", version=f"{rbac}/v1", rules=cluster.get("role", AUTHORITY)["rules"]),
        item("RoleBinding", version=f"{rbac}/v1", roleRef=role, subjects=subjects),
        item("ClusterRoleBinding", NAMESPACE, f"{rbac}/v1", roleRef=cluster_role, subjects=subjects),
        item("Deployment", version="apps/v1", spec=spec),
    ]


def test_four_replicas_with_an_empty_secret_create_one_ca() -> None:
    """One of the replicas creates the CA in the Secret, and all serve under its root, in whatever order they start."""
    cluster.create_namespace(NAMESPACE)
    cluster.apply(*_second_installation())
    cluster.wait_for("Available", f"deployment/{AUTHORITY}", namespace=NAMESPACE, seconds=90)
    pods = cluster.find("pods", namespace=NAMESPACE)
    root = authority.secret_root(NAMESPACE)
    assert cluster.get("configmap", "certmount-root", NAMESPACE)["data"]["root.crt"].encode() == root
    logs = [cluster.kubectl("-n", NAMESPACE, "logs", pod["metadata"]["name"]) for pod in pods]
    assert sum(log.count(f'"{CA_SAVED}"') for log in logs) == 1
    trusted = authority.serving_root(NAMESPACE)
    for pod in pods:
        # The TLS handshake with a replica that serves under another root would fail.
        result = authority.issue("", None, address=f"{pod['status']['podIP']}:8443", trusted=trusted)
        assert result.reason == "TokenRejected", pod["metadata"]["name"]
    cluster.delete_namespace(NAMESPACE)


@pytest.mark.timeout(180)
def test_applying_the_manifests_again_keeps_the_ca() -> None:
    """``kubectl apply -k`` reports "unchanged" for the Secret and the ConfigMap that the authority has written."""

    def written() -> tuple[Any, Any]:
        return cluster.get("secret", "certmount-ca")["data"], cluster.get("configmap", "certmount-root")["data"]

    before = written()
    output = cluster.kubectl("apply", "-k", os.environ["CERTMOUNT_E2E_OVERLAY"])
    assert written() == before
    pairs = ("intermediate.crt", "intermediate.key", "root.crt", "root.key", "serving.crt", "serving.key")
    assert sorted(before[0]) == [*pairs, "state.json"]
    assert "secret/certmount-ca unchanged" in output
    assert "configmap/certmount-root unchanged" in output


def test_kubelet_passes_tokens_as_secrets_if_the_cluster_supports_it() -> None:
    """From Kubernetes 1.35 on, the CSIDriver keeps tokens out of the volume attributes (KEP-5538)."""
    minor = int(json.loads(cluster.kubectl("version", "-o", "json"))["serverVersion"]["minor"])
    driver = cluster.get("csidriver", "csi.certmount.dev")["spec"]
    assert driver.get("serviceAccountTokenInSecrets", False) is (minor >= 35)


def test_driver_is_registered_with_its_node_name() -> None:
    drivers = cluster.wait_until(
        lambda: cluster.get("csinode", host.NODE)["spec"]["drivers"], seconds=20, what="a registered driver"
    )
    assert [(driver["name"], driver["nodeID"]) for driver in drivers] == [("csi.certmount.dev", host.NODE)]
