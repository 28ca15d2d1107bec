"""Pods with certificates from the kubelet (podCertificate volumes) next to pods with CSI volumes.

They need Kubernetes 1.37, or 1.35 and 1.36 with the feature gates that ``run`` enables.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from csi_driver.core.certificates.csr import names_of
from tests.e2e import cluster, host
from tests.e2e.pods import TLS, Pod, manifest, service, with_script
from tests.support.requirements import missing

NAMESPACE = "e2e-native"
BUNDLE = "certmount.dev:pod:internal"
ROOTS = {
    "signerName": "certmount.dev/pod",
    "labelSelector": {"matchLabels": {"certmount.dev/root-set": "internal"}},
    "path": "root.crt",
}
COMPONENT = Path(__file__).parents[2] / "deploy/components/pod-certificates"
_CONTAINER = "/spec/template/spec/containers/0"
KEY_TYPES = ("ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519", "RSA3072", "RSA4096")
PODS_AT_ONCE = 30
NATIVE_SERVER, CSI_SERVER = Pod(NAMESPACE, "native-server"), Pod(NAMESPACE, "csi-server")
CSI_CLIENT, NATIVE_CLIENT = Pod(NAMESPACE, "csi-client"), Pod(NAMESPACE, "native-client")


def _served() -> bool:
    versions = json.loads(cluster.kubectl("get", "--raw", "/apis/certificates.k8s.io"))["versions"]
    groups = [json.loads(cluster.kubectl("get", "--raw", f"/apis/{one['groupVersion']}")) for one in versions]
    return any(one["name"] == "podcertificaterequests" for group in groups for one in group["resources"])


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """The component of the manifests, which is removed at the end: a rotation would wait for its bundle."""
    if not _served():
        if os.environ.get("LOCALKUBE_VERSION", "") >= "1.35":
            missing("needs an API server that serves PodCertificateRequests")
        pytest.skip("needs Kubernetes 1.35 or newer: LOCALKUBE_VERSION=1.37.2 tests/e2e/run")
    for name in ("rbac", "admission", "lease"):
        cluster.kubectl("apply", "-f", str(COMPONENT / f"{name}.yaml"))
    (patch,) = yaml.safe_load((COMPONENT / "kustomization.yaml").read_text())["patches"]
    cluster.create_namespace(NAMESPACE)
    before = _arguments()
    # Not the whole overlay, which has no Secrets controller.
    _patch_authority(yaml.safe_load(patch["patch"]))
    cluster.wait_until(_bundle, seconds=60, what="the trust bundle")
    yield
    cluster.delete_namespace(NAMESPACE)
    _patch_authority([{"op": "replace", "path": f"{_CONTAINER}/args", "value": before}])


def _arguments() -> list[str]:
    (container,) = cluster.get("deployment", "certmount-authority")["spec"]["template"]["spec"]["containers"]
    return list(container["args"])


def _patch_authority(operations: list[dict[str, Any]]) -> None:
    operation = ("deployment", "certmount-authority", "--type=json", "-p", json.dumps(operations))
    cluster.kubectl("-n", cluster.CERTMOUNT, "patch", *operation)
    cluster.wait_for_rollout()


def _bundle() -> str:
    try:
        return str(
            json.loads(cluster.kubectl("get", "clustertrustbundle", BUNDLE, "-o", "json"))["spec"]["trustBundle"]
        )
    except cluster.KubectlError:
        return ""


def native(pod: Pod, annotations: Mapping[str, str] | None = None, key_type: str = "ECDSAP256", **options: Any) -> Any:
    """Return the manifest of a pod whose volume has the files of a CSI volume, but from the kubelet."""
    item = manifest(pod, {}, **options)
    certificate = {
        "signerName": "certmount.dev/pod",
        "keyType": key_type,
        "credentialBundlePath": "site.pem",
        "certificateChainPath": "site.crt",
        "keyPath": "site.key",
        "userAnnotations": {f"certmount.dev/{name}": value for name, value in (annotations or {}).items()},
    }
    sources = [{"podCertificate": certificate}, {"clusterTrustBundle": ROOTS}]
    item["spec"]["volumes"] = [{"name": "tls", "projected": {"sources": sources}}]
    return item


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_pod_starts_with_a_certificate_for_its_names(key_type: str) -> None:
    pod = Pod(NAMESPACE, f"keys-{key_type.lower()}")
    cluster.apply(native(pod, {"dns-names": f"${{POD_NAME}}.{NAMESPACE}.svc"}, key_type))
    pod.wait_until_ready()
    leaf, intermediate = x509.load_pem_x509_certificates(pod.read("site.crt").encode())
    expected = {f"{pod.name}.{NAMESPACE}.svc", f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"}
    assert {str(name) for name in names_of(leaf.extensions)} == expected
    roots = x509.load_pem_x509_certificates(pod.read("root.crt").encode())
    intermediate.verify_directly_issued_by(next(root for root in roots if root.subject == intermediate.issuer))
    pod.delete("--wait=false")


def test_refusal_names_the_fix_in_the_condition_and_in_the_events() -> None:
    pod = Pod(NAMESPACE, "refused")
    cluster.apply(native(pod, {"name": "shop.example.org"}))
    found = _condition(pod)
    fix = "ask an administrator to add a rule to the policy"
    assert (found["type"], found["reason"], fix in found["message"]) == ("Denied", "NameNotAllowed", True)

    def event() -> bool:
        events = cluster.events_of(pod.name, NAMESPACE, reason="NameNotAllowed")
        return any(fix in (one.get("message") or one.get("note") or "") for one in events)

    cluster.wait_until(event, seconds=60, what="the event of certmount")
    pod.delete("--wait=false")


def test_user_with_the_permission_to_create_requests_cannot_forge_one() -> None:
    """The request of a node for its pod is copied with the name of the pod only, as the administrator's user."""
    pod = Pod(NAMESPACE, "copied")
    cluster.apply(native(pod))
    pod.wait_until_ready()
    found = cluster.find("podcertificaterequests", namespace=NAMESPACE)
    own = next(one for one in found if one["spec"]["podName"] == pod.name)
    item = {
        "apiVersion": own["apiVersion"],
        "kind": "PodCertificateRequest",
        "metadata": {"name": "forged", "namespace": NAMESPACE},
        "spec": own["spec"],
    }
    with pytest.raises(cluster.KubectlError, match="only the kubelet of the pod's node can create requests"):
        cluster.kubectl("create", "-f", "-", text=json.dumps(item))
    pod.delete("--wait=false")


def test_pods_start_although_a_replica_the_api_server_and_the_kubelet_are_killed() -> None:
    pods = [Pod(NAMESPACE, f"restart-{number}") for number in range(10)]
    items = [native(pod) for pod in pods]
    for item in items:
        item["spec"]["restartPolicy"] = "OnFailure"  # a container cannot start while its kubelet is killed
    cluster.apply(*items)
    victim = host.authorities()[0]["metadata"]["name"]
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "pod", victim, "--force", "--grace-period=0")
    for component in ("apiserver", "kubelet"):
        host.stop_component(component, how=signal.SIGKILL)
    assert host.start_components()
    for pod in pods:
        pod.wait_until_ready(120)
    cluster.wait_for_rollout()
    requests = cluster.find("podcertificaterequests", namespace=NAMESPACE)
    conditions = [one["status"]["conditions"] for one in requests if one["spec"]["podName"].startswith("restart-")]
    assert all(len(found) == 1 and found[0]["type"] == "Issued" for found in conditions)
    for pod in pods:
        pod.delete("--wait=false")


@pytest.mark.timeout(900)
def test_both_kinds_connect_while_a_new_root_starts_to_sign() -> None:
    """A CSI client to a native server, and the reverse. The former root is not removed here: that takes at least an hour."""
    csi = {"duration": "1m"}
    for server in (NATIVE_SERVER, CSI_SERVER):
        name = f"{server.name}.{NAMESPACE}.svc"
        item = native if server is NATIVE_SERVER else manifest
        options = {"name": name} if server is NATIVE_SERVER else csi | {"name": name}
        cluster.apply(service(server.name, NAMESPACE))
        cluster.apply(*with_script(item(server, options, labels={"app": server.name}), "server.py"))
    for client, server in ((CSI_CLIENT, NATIVE_SERVER), (NATIVE_CLIENT, CSI_SERVER)):
        item = native(client) if client is NATIVE_CLIENT else manifest(client, csi)
        cluster.apply(*with_script(item, "client.py", f"{server.name}.{NAMESPACE}.svc", "10"))
    for client in (CSI_CLIENT, NATIVE_CLIENT):
        client.wait_until_ready()
        cluster.wait_until(
            lambda client=client: _status(client)["connections"] > 20,  # type: ignore[misc]
            seconds=90,
            what=f"connections of {client.name}",
        )
    old = _bundle()
    begin = time.monotonic()
    _ca("rotate")
    cluster.wait_until(lambda: _bundle() != old, seconds=30, what="two roots in the bundle")
    for client in (CSI_CLIENT, NATIVE_CLIENT):
        cluster.wait_until(
            lambda client=client: client.read("root.crt").count("BEGIN") == 2,  # type: ignore[misc]
            seconds=150,
            what=f"two roots in {client.name}",
        )
    distributed = time.monotonic() - begin
    cluster.wait_until(lambda: _phase() == "retiring", seconds=520, what="the new CA signs")
    new = Pod(NAMESPACE, "new-ca")
    cluster.apply(native(new))
    new.wait_until_ready()
    # The CSI server renews within a minute, and the native client trusts its new certificate.
    cluster.wait_until(
        lambda: len(_status(NATIVE_CLIENT)["servers"]) > 2, seconds=120, what="a renewal of the CSI server"
    )
    print(
        f"both roots in all volumes after {distributed:.0f} s, the new CA signed after {time.monotonic() - begin:.0f} s"
    )
    for client in (CSI_CLIENT, NATIVE_CLIENT):
        found = _status(client)
        print(f"{client.name}: {found['connections']} connections, {found['failures']} failures")
        assert found["failures"] == 0, found["errors"]


@pytest.mark.timeout(600)
def test_thirty_pods_at_once_and_with_other_volumes() -> None:
    """Prints the seconds until all pods are ready: with an empty volume, a CSI volume and a podCertificate volume."""
    for kind in ("empty", "csi", "native"):
        pods = [Pod(NAMESPACE, f"{kind}-{number}") for number in range(PODS_AT_ONCE)]
        items = [native(pod) if kind == "native" else manifest(pod, {}) for pod in pods]
        if kind == "empty":
            for item in items:
                item["spec"]["volumes"] = [{"name": "tls", "emptyDir": {}}]
        begin = time.monotonic()
        cluster.apply(*items)
        for pod in pods:
            pod.wait_until_ready(180)
        print(f"{PODS_AT_ONCE} pods at once, {kind} volume: {time.monotonic() - begin:.1f} s")
        if kind != "empty":
            assert f"{TLS}/site.pem" in pods[0].run("ls", f"{TLS}/site.pem")
        cluster.kubectl("-n", NAMESPACE, "delete", "pod", *(pod.name for pod in pods), "--force", "--grace-period=0")


def _condition(pod: Pod) -> dict[str, Any]:
    """Return the condition of the pod's request, as soon as it has one."""

    def condition() -> dict[str, Any] | None:
        found = cluster.find("podcertificaterequests", namespace=NAMESPACE)
        own = [one for one in found if one["spec"]["podName"] == pod.name]
        return next((item for one in own for item in one.get("status", {}).get("conditions", [])), None)

    return cluster.wait_until(condition, seconds=60, what=f"a condition of the request of {pod.name}")


def _ca(*arguments: str) -> str:
    command = ("exec", "deploy/certmount-authority", "--", "/opt/certmount/bin/certmount", "ca", *arguments)
    return cluster.kubectl("-n", cluster.CERTMOUNT, *command)


def _phase() -> str:
    return str(json.loads(_ca("status", "-o", "json"))["phase"])


def _status(client: Pod) -> dict[str, Any]:
    lines = [line for line in client.logs("--tail=5").splitlines() if "connections" in line]
    empty: dict[str, Any] = {"connections": 0, "failures": 0, "errors": [], "servers": []}
    return json.loads(lines[-1]) if lines else empty
