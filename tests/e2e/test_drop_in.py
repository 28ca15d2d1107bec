"""Manifests for autocert and for cert-manager's csi-driver, with certmount in their place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.e2e import cluster
from tests.e2e.pods import BUSYBOX, Pod, manifest

NAMESPACE = "e2e-drop-in"
NAME = f"hello.{NAMESPACE}.svc"
COMPONENT = Path(__file__).parents[2] / "deploy" / "components" / "autocert"
PREFIX = "autocert.step.sm/"
DIRECTORY = "/var/run/autocert.step.sm"
Annotations = Mapping[str, str]


@pytest.fixture(scope="module", autouse=True)
def namespace() -> Iterator[None]:
    cluster.create_namespace(NAMESPACE)
    cluster.kubectl("label", "namespace", NAMESPACE, "autocert.step.sm=enabled")
    yield
    cluster.delete_namespace(NAMESPACE)


@pytest.fixture(scope="module")
def component() -> Iterator[None]:
    """The component, without kustomize, which would add its objects to the rest of deploy/."""
    resources = cluster.kubectl("api-resources", "--api-group=admissionregistration.k8s.io", "-o", "name")
    if "mutatingadmissionpolicies" not in resources or not _served("admissionregistration.k8s.io/v1"):
        pytest.skip("needs MutatingAdmissionPolicy in admissionregistration.k8s.io/v1 (Kubernetes 1.36)")
    policy, created = str(COMPONENT / "policy.yaml"), ("configmap", "certmount-autocert")
    cluster.kubectl("-n", cluster.CERTMOUNT, "create", *created, f"--from-env-file={COMPONENT / 'autocert.env'}")
    cluster.kubectl("apply", "-f", policy)
    _wait_for_issuer("internal")
    yield
    cluster.kubectl("delete", "-f", policy)
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", *created)


def _served(version: str) -> bool:
    found = json.loads(cluster.kubectl("get", "--raw", f"/apis/{version}"))
    return any(one["name"] == "mutatingadmissionpolicies" for one in found["resources"])


def _pod(annotations: Annotations, name: str = "never-created", **spec: Any) -> dict[str, Any]:
    """Return the manifest of a pod for autocert. Its init container needs the certificate."""
    container = {"image": BUSYBOX, "imagePullPolicy": "Never"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "annotations": {PREFIX + key: value for key, value in annotations.items()},
        },
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "initContainers": [{"name": "init", "command": ["cat", f"{DIRECTORY}/site.key"], **container}],
            "containers": [{"name": "app", **container}, {"name": "sidecar", **container}],
            **spec,
        },
    }


def _admitted(pod: Mapping[str, Any]) -> Any:
    """Return the pod that the API server would store."""
    output = cluster.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", text=json.dumps(pod))
    return json.loads(output)


def _wait_for_issuer(name: str) -> None:
    """Wait until the API server has loaded the policies and the issuer, which it does after their creation."""

    def loaded() -> bool:
        volume = _volumes(_pod({"name": NAME})).get("autocert-certs")
        return volume is not None and volume["csi"]["volumeAttributes"]["issuer"] == name

    cluster.wait_until(loaded, seconds=60, what="the policy is in force")


def _volumes(pod: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {volume["name"]: volume for volume in _admitted(pod)["spec"].get("volumes", [])}
    except cluster.KubectlError:  # until the API server has loaded both policies
        return {}


def _rejection(pod: Mapping[str, Any]) -> str:
    with pytest.raises(cluster.KubectlError) as raised:
        _admitted(pod)
    return str(raised.value).partition("denied request: ")[2].strip()


@pytest.mark.usefixtures("component")
def test_pod_of_autocert_has_the_files_at_the_same_paths() -> None:
    annotations = {
        "name": NAME, "sans": f"{NAME}.cluster.local", "duration": "1h", "owner": "999:998", "mode": "0600",
        "init-first": "true", "bootstrapper-only": "false",
    }  # fmt: skip
    cluster.apply(_pod(annotations, "hello", securityContext={"runAsUser": 999, "runAsGroup": 998}))
    pod = Pod(NAMESPACE, "hello")
    pod.wait_until_ready()
    assert {"root.crt", "site.crt", "site.key"} <= set(pod.run("ls", DIRECTORY).split())
    assert pod.run("stat", "-L", "-c", "%a %u %g", f"{DIRECTORY}/site.key").split() == ["600", "999", "998"]
    certificate = x509.load_pem_x509_certificate(pod.run("cat", f"{DIRECTORY}/site.crt").encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME, f"{NAME}.cluster.local"]
    assert certificate.subject.rfc4514_string() == f"CN={NAME}"
    for container in ("app", "sidecar"):
        cluster.kubectl("-n", NAMESPACE, "exec", "hello", "-c", container, "--", "cat", f"{DIRECTORY}/root.crt")


@pytest.mark.usefixtures("component")
def test_annotations_become_attributes() -> None:
    sans = "a.example.com, 10.0.0.1,spiffe://example.com/x , me@example.com"
    spec = _admitted(_pod({"name": NAME, "sans": sans, "mode": "0644"}))["spec"]
    (volume,) = spec["volumes"]
    assert volume["csi"] == {
        "driver": "csi.certmount.dev",
        "readOnly": True,
        "volumeAttributes": {
            "name": NAME, "issuer": "internal", "dns-names": "a.example.com", "ip-sans": "10.0.0.1",
            "uri-sans": "spiffe://example.com/x", "email-sans": "me@example.com", "spiffe": "false",
        },
    }  # fmt: skip
    mount = {"name": "autocert-certs", "mountPath": DIRECTORY, "readOnly": True}
    assert [one["volumeMounts"] for one in (*spec["initContainers"], *spec["containers"])] == [[mount]] * 3


@pytest.mark.usefixtures("component")
def test_other_pods_are_not_changed() -> None:
    pod = _pod({})
    assert "volumes" not in _admitted(pod)["spec"]
    pod["metadata"] |= {"namespace": "default", "annotations": {f"{PREFIX}name": NAME}}
    assert "volumes" not in _admitted(pod)["spec"]


MOUNTED = {
    "containers": [{"name": "app", "image": BUSYBOX, "volumeMounts": [{"name": "own", "mountPath": DIRECTORY}]}],
    "volumes": [{"name": "own", "emptyDir": {}}],
}


@pytest.mark.usefixtures("component")
@pytest.mark.parametrize(
    "annotations, spec, message",
    [
        (
            {"name": NAME, "owner": "www-data"}, {},
            "annotation autocert.step.sm/owner: 'www-data' is not a user and a group; use two numbers, for example 999:999",
        ),
        (
            {"name": NAME, "mode": "0777"}, {},
            ("annotation autocert.step.sm/mode: '0777' is not a mode that certmount can set; use 0400, 0440, 0600, 0640, "
            "or 0644 without an owner"),
        ),
        (
            {"name": NAME, "mode": "0644", "owner": "999:999"}, {},
            ("annotation autocert.step.sm/mode: with an owner, certmount gives no other user access to the key, but '0644' "
            "does; use 0400, 0440, 0600 or 0640, or remove autocert.step.sm/owner"),
        ),
        (
            {"sans": NAME}, {},
            ("annotation autocert.step.sm/name: is missing or empty; set the name of the certificate, or remove the other "
            "annotations of autocert"),
        ),
        (
            {"name": NAME, "init-first": "yes"}, {},
            "annotations autocert.step.sm/init-first and autocert.step.sm/bootstrapper-only: use true or false",
        ),
        ({"name": NAME, "san": NAME}, {}, "annotation autocert.step.sm/san: is unknown to certmount; use one of autocert.step.sm/name,"),
        (
            {"name": NAME}, MOUNTED,
            "a container already mounts a volume at /var/run/autocert.step.sm; remove it, or the annotations of autocert",
        ),
    ],
)  # fmt: skip
def test_annotation_that_cannot_be_honored_is_rejected(
    annotations: Annotations, spec: dict[str, Any], message: str
) -> None:
    assert _rejection(_pod(annotations, **spec)).startswith(message)


@pytest.mark.usefixtures("component")
def test_pod_is_rejected_if_the_issuer_is_not_configured() -> None:
    """Only annotated pods are. Without this, they would start without a certificate."""
    issuer = cluster.get("configmap", "certmount-autocert")["data"]
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "configmap", "certmount-autocert")
    try:
        message = "certmount added no volume to the pod; create the ConfigMap certmount-autocert in namespace certmount"
        cluster.wait_until(
            lambda: not _volumes(_pod({"name": NAME})), seconds=30, what="the API server has seen the removal"
        )
        assert _rejection(_pod({"name": NAME})).startswith(message)
        _admitted(_pod({}))
    finally:
        metadata = {"name": "certmount-autocert", "namespace": cluster.CERTMOUNT}
        cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": issuer})
        _wait_for_issuer("internal")


def test_volume_of_cert_managers_csi_driver() -> None:
    pod = Pod(NAMESPACE, "cert-manager")
    attributes = {
        "issuer-name": "internal", "issuer-kind": "ClusterIssuer", "duration": "2h", "is-ca": "false",
        "dns-names": "${POD_NAME}.${POD_NAMESPACE}.svc", "key-usages": "server auth,client auth",
        "certificate-file": "server.crt",
    }  # fmt: skip
    cluster.apply(manifest(pod, {f"csi.cert-manager.io/{key}": value for key, value in attributes.items()}))
    pod.wait_until_ready()
    certificate = x509.load_pem_x509_certificate(pod.read("server.crt").encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [f"cert-manager.{NAMESPACE}.svc"]
    assert "PRIVATE KEY" in pod.read("tls.key")
    assert "CERTIFICATE" in pod.read("ca.crt")


def test_attribute_of_cert_managers_csi_driver_that_is_not_possible() -> None:
    pod = Pod(NAMESPACE, "cert-manager-ca")
    cluster.apply(manifest(pod, {"csi.cert-manager.io/issuer-name": "internal", "csi.cert-manager.io/is-ca": "true"}))
    expected = (
        "volumeAttributes.csi.cert-manager.io/is-ca: certmount never issues CA certificates to pods; "
        'remove it, or write "false"'
    )
    assert expected in cluster.wait_for_mount_failure(pod.name, NAMESPACE)
