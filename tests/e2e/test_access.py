"""The rights of both service accounts, and what a call with a wrong token gets: nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.e2e import authority, cluster, host
from tests.e2e.pods import Pod, manifest, with_script

NAMESPACE = "e2e-access"
OTHER_NODE = "node2"
LOCAL = Pod(NAMESPACE, "local")
ATTACKER = Pod(NAMESPACE, "attacker")
REMOTE = Pod(NAMESPACE, "remote")


def _other_node() -> Any:
    """Return a node without a kubelet. Only pods that tolerate everything are bound to it."""
    metadata = {"name": OTHER_NODE, "labels": {"kubernetes.io/os": "linux"}}
    taints = [{"key": "certmount.dev/e2e", "effect": "NoSchedule"}]
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints}}


def _remote() -> Any:
    pod = manifest(REMOTE, {})
    pod["spec"]["nodeName"] = OTHER_NODE
    return pod


def _attacker() -> tuple[Any, Any]:
    """Return a pod with projected tokens for certmount's own audiences, which every pod can have."""
    config_map, pod = with_script(manifest(ATTACKER, {}), "attacker.py")
    # The root of the authority's TLS certificate is public: every node has it.
    config_map["data"]["authority.crt"] = authority.serving_root().decode()
    sources = [
        {"serviceAccountToken": {"audience": audience, "path": path, "expirationSeconds": 600}}
        for path, audience in {"pod": "certmount", "node": "certmount-node"}.items()
    ]
    pod["spec"]["volumes"].append({"name": "tokens", "projected": {"sources": sources}})
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "tokens", "mountPath": "/tokens"})
    return config_map, pod


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A pod on this node, an attacker, and a pod on a second node that is an API object only and also has a driver pod."""
    cluster.create_namespace(NAMESPACE)
    cluster.kubectl("create", "serviceaccount", "fresh", "-n", NAMESPACE)
    cluster.apply(_other_node(), manifest(LOCAL, {}), *_attacker(), _remote())
    capacity = json.dumps({"status": {"capacity": {"cpu": "1", "memory": "1Gi", "pods": "10"}}})
    cluster.kubectl("patch", "node", OTHER_NODE, "--subresource=status", "-p", capacity)
    LOCAL.wait_until_ready()
    yield
    cluster.kubectl("delete", "node", OTHER_NODE)
    REMOTE.delete("--force", "--grace-period=0")
    selector = ("--field-selector", f"spec.nodeName={OTHER_NODE}")
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "pods", *selector, "--force", "--grace-period=0")


@pytest.fixture(scope="module")
def node_token() -> str:
    return authority.node_token()


@pytest.fixture(scope="module")
def pod_token() -> str:
    return authority.pod_token(NAMESPACE, LOCAL.name)


def _rules(account: str, account_namespace: str, namespace: str) -> set[str]:
    """Return the rules that a SelfSubjectRulesReview lists for an account in a namespace."""
    token = authority.token(account, account_namespace)
    output = cluster.kubectl_with_token(token, "auth", "can-i", "--list", "--no-headers", "-n", namespace)
    return {" ".join(line.split()) for line in output.splitlines()}


@pytest.mark.parametrize("namespace", [cluster.CERTMOUNT, NAMESPACE, "kube-system"])
def test_node_account_has_only_the_rights_of_every_account(namespace: str) -> None:
    assert _rules("certmount-node", cluster.CERTMOUNT, namespace) == _rules("fresh", NAMESPACE, namespace)


def test_api_server_rejects_the_token_of_the_driver() -> None:
    """The token in the driver's container does not authenticate at the API server, and is the pod's only token."""
    uid = host.driver()["metadata"]["uid"]
    projected = host.KUBELET / "pods" / uid / "volumes" / "kubernetes.io~projected"
    with pytest.raises(cluster.KubectlError, match="Unauthorized"):
        cluster.kubectl_with_token((projected / "token" / "token").read_text(), "auth", "whoami")
    assert [volume.name for volume in projected.iterdir()] == ["token"]


def test_authority_account_has_only_the_documented_rights() -> None:
    """In addition to the rights of every account: the listed ones, and get and update of its own objects."""
    common = _rules("fresh", NAMESPACE, cluster.CERTMOUNT)
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
    assert _rules("certmount-authority", cluster.CERTMOUNT, cluster.CERTMOUNT) - common == everywhere | {
        "secrets [] [certmount-ca] [get update]",
        "secrets [] [certmount-acknowledgements] [get update]",
        "configmaps [] [certmount-root] [get update]",
        "leases.coordination.k8s.io [] [certmount-csr-signer] [get update]",
    }
    assert _rules("certmount-authority", cluster.CERTMOUNT, NAMESPACE) - common == everywhere


def test_call_with_both_tokens_succeeds(pod_token: str, node_token: str) -> None:
    """The calls of this module are valid: with the right tokens, one of them succeeds."""
    assert authority.issue(pod_token, node_token).reason == ""


def test_pod_with_its_own_tokens_is_rejected() -> None:
    cluster.wait_for("jsonpath={.status.phase}=Succeeded", f"pod/{ATTACKER.name}", namespace=NAMESPACE)
    reasons = json.loads(ATTACKER.logs())
    assert len(reasons) == 6
    assert set(reasons.values()) == {"TokenRejected"}, reasons


def test_token_of_a_pod_on_another_node_is_rejected(node_token: str) -> None:
    result = authority.issue(authority.pod_token(NAMESPACE, REMOTE.name), node_token)
    assert result.reason == "TokenRejected"
    assert f"belongs to a pod on node {OTHER_NODE}, but the driver on node {host.NODE} sent it" in result.message


def test_token_of_another_nodes_driver_is_rejected(pod_token: str) -> None:
    """A stolen pod token is useless on any node but the pod's own."""

    def drivers() -> list[Any]:
        label = "app.kubernetes.io/name=certmount-node"
        return cluster.find("pods", "-l", label, "--field-selector", f"spec.nodeName={OTHER_NODE}")

    (driver, *_) = cluster.wait_until(drivers, seconds=30, what=f"a pod of the DaemonSet on {OTHER_NODE}")
    other = authority.token("certmount-node", cluster.CERTMOUNT, driver["metadata"]["name"], "certmount-node")
    result = authority.issue(pod_token, other)
    assert result.reason == "TokenRejected"
    assert f"belongs to a pod on node {host.NODE}, but the driver on node {OTHER_NODE} sent it" in result.message


def test_forged_and_misused_tokens_are_rejected(pod_token: str, node_token: str) -> None:
    claims = jwt.decode(pod_token, options={"verify_signature": False})
    key_id = {"kid": jwt.get_unverified_header(pod_token)["kid"]}
    wrong_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    body, signature = pod_token.rsplit(".", 1)
    wrong_pod_tokens = {
        "signed by another key": jwt.encode(claims, wrong_key, "RS256", key_id),
        "unsigned": jwt.encode(claims, "", "none", key_id),
        "with a changed body": f"{body[:-4]}AAAA.{signature}",
        "for another audience": authority.token("default", NAMESPACE, LOCAL.name, "vault"),
        "bound to no pod": authority.token("default", NAMESPACE, audience="certmount"),
        "of the node": node_token,
        "empty": "",
    }
    for what, token in wrong_pod_tokens.items():
        assert authority.issue(token, node_token).reason == "TokenRejected", f"pod token {what}"
    wrong_node_tokens = {
        "of another account": authority.token("default", NAMESPACE, LOCAL.name, "certmount-node"),
        "of the pod": pod_token,
        "bound to no pod": authority.token("certmount-node", cluster.CERTMOUNT, audience="certmount-node"),
        "missing": None,
    }
    for what, wrong in wrong_node_tokens.items():
        assert authority.issue(pod_token, wrong).reason == "TokenRejected", f"node token {what}"


def test_token_is_rejected_seconds_after_its_pod_is_deleted(pod_token: str, node_token: str) -> None:
    LOCAL.delete()

    def rejection(*reasons: str) -> authority.IssueResult | None:
        result = authority.issue(pod_token, node_token)
        return result if result.reason in reasons else None

    # The authority's pod watch reports the deletion first; an earlier token review counts for some more seconds.
    cluster.wait_until(
        lambda: rejection("PodNotFound", "TokenRejected"), seconds=10, what="a rejection for the deleted pod"
    )
    rejected = cluster.wait_until(
        lambda: rejection("TokenRejected"), seconds=15, what="a rejection of the token itself"
    )
    assert "the API server rejects the token" in rejected.message
