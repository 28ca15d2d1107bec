"""An installation: how the CA comes to be, and that applying the manifests again leaves it alone."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from cryptography import x509

from tests.e2e import authority, host
from tests.e2e.kubectl import CERTMOUNT, apply, find, get, kubectl, make_namespace, wait_for, wait_until
from tests.e2e.logs import LogKeeper

RACE = "e2e-first-start"
REPLICAS = 4


def test_one_ca_is_made_by_two_replicas_that_start_at_once(logs: LogKeeper) -> None:
    """Of all replicas of the first start one has saved a CA; the nodes' ConfigMap holds its root and no other."""
    saved = [event for event in logs.events("certmount-authority") if event["event"] == "certificate authority saved"]
    assert len(saved) == 1
    assert authority.secret_root() == authority.root()
    assert len(x509.load_pem_x509_certificates(authority.root())) == 1


def test_replicas_share_the_ca_and_both_issue() -> None:
    """Each of the two replicas, asked by its own address, issues a certificate under the one root."""
    driver = host.driver()["metadata"]["name"]
    token = authority.token("certmount-node", CERTMOUNT, driver, "certmount")
    caller = authority.token("certmount-node", CERTMOUNT, driver, "certmount-node")
    replicas = host.pods_of("certmount-authority")
    outcomes = [authority.issue(token, caller, address=f"{replica['status']['podIP']}:8443") for replica in replicas]
    assert len(outcomes) == 2
    assert [outcome.reason for outcome in outcomes] == ["", ""]
    assert len({outcome.roots for outcome in outcomes}) == 1
    assert len({outcome.leaf.issuer for outcome in outcomes if outcome.leaf}) == 1


def _copies(namespace: str) -> list[dict[str, Any]]:
    """The authority once more, in another namespace, with four replicas that all find an empty Secret."""
    bare = {"namespace": namespace}
    account = {"kind": "ServiceAccount", "name": "certmount-authority", "namespace": namespace}
    deployment = get("deployment", "certmount-authority")
    spec = deployment["spec"]
    spec["replicas"] = REPLICAS
    container = spec["template"]["spec"]["containers"][0]
    container["args"] = [
        argument.replace("=certmount/certmount-ca", f"={namespace}/certmount-ca").replace(
            "=certmount/certmount-root", f"={namespace}/certmount-root"
        )
        for argument in container["args"]
    ]
    role = get("role", "certmount-authority")
    reference = {"apiGroup": "rbac.authorization.k8s.io", "name": "certmount-authority"}
    return [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "certmount-ca", **bare}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "certmount-confirmations", **bare}},
        {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "certmount-csr-signer", **bare}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "certmount-root", **bare}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "certmount-policy", **bare},
            "data": {"policy.yaml": ""},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "certmount-issuers", **bare},
            "data": {"issuers.yaml": ""},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "certmount-authority", **bare}},
        {**role, "metadata": {"name": "certmount-authority", **bare}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "certmount-authority", **bare},
            "roleRef": {**reference, "kind": "Role"},
            "subjects": [account],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": namespace},
            "roleRef": {**reference, "kind": "ClusterRole"},
            "subjects": [account],
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "certmount-authority", **bare},
            "spec": spec,
        },
    ]


def test_four_replicas_that_race_for_an_empty_secret_end_with_one_ca() -> None:
    """However their first starts overlap, all replicas serve under the root in the Secret, and one of them made it."""
    make_namespace(RACE)
    apply(*_copies(RACE))
    wait_for("Available", "deployment/certmount-authority", namespace=RACE, seconds=90)
    pods = find("pods", namespace=RACE)
    trusted = authority.secret_root(RACE)
    assert get("configmap", "certmount-root", RACE)["data"]["root.crt"].encode() == trusted
    logs = [kubectl("-n", RACE, "logs", pod["metadata"]["name"]) for pod in pods]
    assert sum(log.count("certificate authority saved") for log in logs) == 1
    for pod in pods:
        # A replica that served under another root would end the handshake.
        outcome = authority.issue(
            "", None, address=f"{pod['status']['podIP']}:8443", trusted=authority.serving_root(RACE)
        )
        assert outcome.reason == "TokenRejected", pod["metadata"]["name"]
    kubectl("-n", RACE, "delete", "deployment", "certmount-authority", "--wait=false")


@pytest.mark.timeout(180)
def test_applying_the_manifests_again_keeps_the_ca() -> None:
    """``kubectl apply -k`` leaves alone what the authority has written, and what it says of the two objects is "unchanged"."""
    before = get("secret", "certmount-ca")["data"], get("configmap", "certmount-root")["data"]
    said = kubectl("apply", "-k", os.environ["CERTMOUNT_E2E_OVERLAY"])
    assert (get("secret", "certmount-ca")["data"], get("configmap", "certmount-root")["data"]) == before
    assert sorted(before[0]) == [
        "intermediate.crt",
        "intermediate.key",
        "root.crt",
        "root.key",
        "serving.crt",
        "serving.key",
        "state.json",
    ]
    assert "secret/certmount-ca unchanged" in said
    assert "configmap/certmount-root unchanged" in said


def test_tokens_travel_as_secrets_where_the_cluster_can() -> None:
    """From Kubernetes 1.35 on the kubelet is asked not to put tokens among a volume's attributes (KEP-5538)."""
    minor = int(json.loads(kubectl("version", "-o", "json"))["serverVersion"]["minor"])
    driver = get("csidriver", "csi.certmount.dev")["spec"]
    assert driver.get("serviceAccountTokenInSecrets", False) is (minor >= 35)


def test_the_driver_is_registered_under_its_node() -> None:
    """CSINode names the driver with the node's own name, by which the scheduler and the kubelet know it."""
    drivers = wait_until(lambda: get("csinode", host.NODE)["spec"]["drivers"], seconds=20, what="a registered driver")
    assert [(driver["name"], driver["nodeID"]) for driver in drivers] == [("csi.certmount.dev", host.NODE)]
