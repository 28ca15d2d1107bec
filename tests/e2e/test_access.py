"""What the two service accounts may do, and what a token that is not what it should be gets: nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.e2e import authority, host
from tests.e2e.kubectl import (
    CERTMOUNT,
    KubectlError,
    Manifest,
    apply,
    find,
    kubectl,
    make_namespace,
    wait_for,
    wait_until,
)
from tests.e2e.pods import Pod, manifest, with_script

NAMESPACE = "e2e-access"
OTHER_NODE = "node2"
SUBJECT = Pod(NAMESPACE, "subject")
HOSTILE = Pod(NAMESPACE, "hostile")
FOREIGN = Pod(NAMESPACE, "foreign")


def _other_node() -> Manifest:
    """A node without a kubelet; only what tolerates everything is bound to it."""
    metadata = {"name": OTHER_NODE, "labels": {"kubernetes.io/os": "linux"}}
    taints = [{"key": "certmount.dev/e2e", "effect": "NoSchedule"}]
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints}}


def _on_the_other_node(pod: Pod) -> dict[str, Any]:
    found = dict(manifest(pod, {}))
    found["spec"] = {**found["spec"], "nodeName": OTHER_NODE}
    return found


def _hostile() -> tuple[Any, Any]:
    """A pod that has the kubelet mint tokens for certmount's own audiences, as every pod may."""
    config_map, found = with_script(manifest(HOSTILE, {}), "ask.py")
    # No secret either: every node has the root of the authority's own certificate.
    data = {**config_map["data"], "authority.crt": authority.serving_root().decode()}
    config_map = {**config_map, "data": data}
    spec = found["spec"]
    sources = [
        {"serviceAccountToken": {"audience": audience, "path": path, "expirationSeconds": 600}}
        for path, audience in {"pod": "certmount", "node": "certmount-node"}.items()
    ]
    spec["volumes"].append({"name": "tokens", "projected": {"sources": sources}})
    spec["containers"][0]["volumeMounts"].append({"name": "tokens", "mountPath": "/tokens"})
    return config_map, found


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A pod on this node, a hostile one, and one on a second node, which is an object only; the DaemonSet reaches there too."""
    make_namespace(NAMESPACE)
    kubectl("create", "serviceaccount", "fresh", "-n", NAMESPACE)
    apply(
        _other_node(),
        manifest(SUBJECT, {}),
        *_hostile(),
        _on_the_other_node(FOREIGN),
    )
    capacity = json.dumps({"status": {"capacity": {"cpu": "1", "memory": "1Gi", "pods": "10"}}})
    kubectl("patch", "node", OTHER_NODE, "--subresource=status", "-p", capacity)
    wait_for("Ready", f"pod/{SUBJECT.name}", namespace=NAMESPACE)
    yield
    kubectl("delete", "node", OTHER_NODE)
    FOREIGN.delete("--force", "--grace-period=0")
    selector = ("--field-selector", f"spec.nodeName={OTHER_NODE}")
    kubectl("-n", CERTMOUNT, "delete", "pods", *selector, "--force", "--grace-period=0")


@pytest.fixture(scope="module")
def node_token() -> str:
    """What the driver of this node shows."""
    return authority.token("certmount-node", CERTMOUNT, host.driver()["metadata"]["name"], "certmount-node")


@pytest.fixture(scope="module")
def pod_token() -> str:
    """What the kubelet gives the driver for the subject's volume."""
    return authority.token("default", NAMESPACE, SUBJECT.name, "certmount")


def _rules(account: str, account_namespace: str, namespace: str) -> set[str]:
    """What a SelfSubjectRulesReview says to an account's own token in a namespace, a line for each rule."""
    token = kubectl("-n", account_namespace, "create", "token", account).strip()
    cluster_ca = str(Path(os.environ["LOCALKUBE_RUN"]) / "pki" / "ca.crt")
    server = ("--kubeconfig=/dev/null", "--server=https://127.0.0.1:6443", f"--certificate-authority={cluster_ca}")
    said = kubectl(*server, f"--token={token}", "auth", "can-i", "--list", "--no-headers", "-n", namespace)
    return {" ".join(line.split()) for line in said.splitlines()}


@pytest.mark.parametrize("namespace", [CERTMOUNT, NAMESPACE, "kube-system"])
def test_node_account_has_no_more_rights_than_any_account(namespace: str) -> None:
    """The driver's account may do on the API server exactly what a new account without any binding may."""
    assert _rules("certmount-node", CERTMOUNT, namespace) == _rules("fresh", NAMESPACE, namespace)


def test_token_of_the_driver_is_no_token_for_the_api_server() -> None:
    """The token in the driver's container does not even authenticate at the API server."""
    uid = host.driver()["metadata"]["uid"]
    path = host.KUBELET / "pods" / uid / "volumes" / "kubernetes.io~projected" / "token" / "token"
    cluster_ca = str(Path(os.environ["LOCALKUBE_RUN"]) / "pki" / "ca.crt")
    server = ("--kubeconfig=/dev/null", "--server=https://127.0.0.1:6443", f"--certificate-authority={cluster_ca}")
    with pytest.raises(KubectlError, match="Unauthorized"):
        kubectl(*server, f"--token={path.read_text()}", "auth", "whoami")
    projected = host.KUBELET / "pods" / uid / "volumes" / "kubernetes.io~projected"
    assert [volume.name for volume in projected.iterdir()] == ["token"], "no other token is in the pod"


def test_authority_account_has_only_the_listed_rights() -> None:
    """Beyond every account's: reviews, lists and watches, Events, requests for its own signer, and get and update on its own objects."""
    common = _rules("fresh", NAMESPACE, CERTMOUNT)
    everywhere = {
        "tokenreviews.authentication.k8s.io [] [] [create]",
        "services [] [] [list watch]",
        "pods [] [] [list watch get]",
        "namespaces [] [] [list watch]",
        "csinodes.storage.k8s.io [] [] [list]",
        "events.events.k8s.io [] [] [create patch]",
        "certificatesigningrequests.certificates.k8s.io [] [] [get list watch]",
        "certificatesigningrequests.certificates.k8s.io/approval [] [] [update]",
        "certificatesigningrequests.certificates.k8s.io/status [] [] [update]",
        "signers.certificates.k8s.io [] [certmount.dev/pod] [approve sign]",
    }
    assert _rules("certmount-authority", CERTMOUNT, CERTMOUNT) - common == everywhere | {
        "secrets [] [certmount-ca] [get update]",
        "secrets [] [certmount-confirmations] [get update]",
        "configmaps [] [certmount-root] [get update]",
        "leases.coordination.k8s.io [] [certmount-csr-signer] [get update]",
    }
    assert _rules("certmount-authority", CERTMOUNT, NAMESPACE) - common == everywhere


def test_both_tokens_together_are_answered(pod_token: str, node_token: str) -> None:
    """The calls of this module are of the right form: with both true tokens one of them succeeds."""
    assert authority.issue(pod_token, node_token).reason == ""


def test_pod_alone_gets_nothing() -> None:
    """A pod that mints tokens for both of certmount's audiences itself, and reaches the authority, is refused every method."""
    wait_for("jsonpath={.status.phase}=Succeeded", f"pod/{HOSTILE.name}", namespace=NAMESPACE)
    outcomes = json.loads(kubectl("-n", NAMESPACE, "logs", HOSTILE.name))
    assert len(outcomes) == 6
    assert set(outcomes.values()) == {"TokenRejected"}, outcomes


def test_token_of_a_pod_on_another_node_is_refused(node_token: str) -> None:
    """A stolen node gets nothing for pods of other nodes."""
    stolen = authority.token("default", NAMESPACE, FOREIGN.name, "certmount")
    outcome = authority.issue(stolen, node_token)
    assert outcome.reason == "TokenRejected"
    assert f"is of a pod on node {OTHER_NODE}, but the driver on node {host.NODE} shows it" in outcome.message


def test_token_of_another_nodes_driver_is_refused(pod_token: str) -> None:
    """A stolen pod token gets nothing at any node but the pod's own."""

    def drivers() -> list[Any]:
        label = "app.kubernetes.io/name=certmount-node"
        return find("pods", "-l", label, "--field-selector", f"spec.nodeName={OTHER_NODE}")

    (driver, *_) = wait_until(drivers, seconds=30, what=f"the DaemonSet makes a pod for {OTHER_NODE}")
    other = authority.token("certmount-node", CERTMOUNT, driver["metadata"]["name"], "certmount-node")
    outcome = authority.issue(pod_token, other)
    assert outcome.reason == "TokenRejected"
    assert f"is of a pod on node {host.NODE}, but the driver on node {OTHER_NODE} shows it" in outcome.message


def test_forged_and_misused_tokens_are_refused(pod_token: str, node_token: str) -> None:
    """Another key's signature, no signature, another audience, another account, an unbound token: each is refused."""
    claims = jwt.decode(pod_token, options={"verify_signature": False})
    header = jwt.get_unverified_header(pod_token)
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    body, signature = pod_token.rsplit(".", 1)
    wrong_pod_tokens = {
        "signed by a stranger's key": jwt.encode(claims, stranger, "RS256", {"kid": header["kid"]}),
        "unsigned": jwt.encode(claims, "", "none", {"kid": header["kid"]}),
        "of a changed body": f"{body[:-4]}AAAA.{signature}",
        "for another audience": authority.token("default", NAMESPACE, SUBJECT.name, "vault"),
        "bound to no pod": kubectl("-n", NAMESPACE, "create", "token", "default", "--audience=certmount").strip(),
        "the node's own": node_token,
        "empty": "",
    }
    for what, token in wrong_pod_tokens.items():
        assert authority.issue(token, node_token).reason == "TokenRejected", f"pod token {what}"
    wrong_node_tokens = {
        "of another account": authority.token("default", NAMESPACE, SUBJECT.name, "certmount-node"),
        "the pod's own": pod_token,
        "bound to no pod": kubectl(
            "-n", CERTMOUNT, "create", "token", "certmount-node", "--audience=certmount-node"
        ).strip(),
        "missing": None,
    }
    for what, wrong in wrong_node_tokens.items():
        assert authority.issue(pod_token, wrong).reason == "TokenRejected", f"node token {what}"


def test_token_outlives_its_pod_by_seconds_only(pod_token: str, node_token: str) -> None:
    """Though it has not expired, a token is refused when its pod is gone."""
    SUBJECT.delete()

    def refusal(*reasons: str) -> authority.Outcome | None:
        outcome = authority.issue(pod_token, node_token)
        return outcome if outcome.reason in reasons else None

    # The authority hears that the pod is gone; a review from before counts for some seconds more.
    wait_until(lambda: refusal("PodNotFound", "TokenRejected"), seconds=10, what="nothing for a deleted pod")
    refused = wait_until(lambda: refusal("TokenRejected"), seconds=15, what="its token itself is refused")
    assert "the API server does not accept it" in refused.message
