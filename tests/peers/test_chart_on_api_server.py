"""A real API server accepts every object of the chart; install, upgrade, rollback and uninstall keep and remove what they must."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from tests.peers.test_chart import EVERYTHING
from tests.support.kubernetes_api import ADMIN, Json, KubernetesApi, Rejected, running_api
from tests.support.manifests import CHART, NAMESPACE, HelmError, chart_objects, helm
from tests.support.requirements import require_kubernetes

VERSION = "1.37.2"
CA = f"/api/v1/namespaces/{NAMESPACE}/secrets/certmount-ca"
_NAMESPACES = (NAMESPACE, "shop", "web", "vault")
_CRDS = ("PodMonitor", "PrometheusRule")
_CLUSTER_WIDE = (
    "csidrivers,clusterroles,clusterrolebindings,mutatingadmissionpolicies,mutatingadmissionpolicybindings,"
    "validatingadmissionpolicies,validatingadmissionpolicybindings"
)


@dataclass(frozen=True)
class Cluster:
    """An API server, and Helm as its administrator."""

    api: KubernetesApi

    def helm(self, command: str, *arguments: str, values: Mapping[str, object] | None = None) -> str:
        flags = (f"--kube-apiserver={self.api.url}", f"--kube-ca-file={self.api.ca}", f"--kube-token={ADMIN}")
        return helm(command, "certmount", *arguments, f"--namespace={NAMESPACE}", *flags, values=values, seconds=120)

    def kubectl(self, *arguments: str, text: str = "") -> str:
        connection = [f"--server={self.api.url}", f"--certificate-authority={self.api.ca}", f"--token={ADMIN}"]
        command = [str(self.api.kubectl_program), *connection, *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def get(self, path: str) -> Json:
        return self.api.call("GET", path)

    def labelled(self) -> set[tuple[str, str]]:
        """Return the kind and the name of all objects that have certmount's label."""
        kinds = "secrets,configmaps,leases,roles,rolebindings,serviceaccounts,services,deployments,daemonsets"
        others = "networkpolicies,poddisruptionbudgets,resourcequotas,podmonitors,prometheusrules"
        selector = "app.kubernetes.io/part-of=certmount"
        found = self.kubectl("get", f"{kinds},{others}", "-A", "-l", selector, "-o", "json")
        wide = self.kubectl("get", _CLUSTER_WIDE, "-l", selector, "-o", "json")
        items = [*json.loads(found)["items"], *json.loads(wide)["items"]]
        return {(one["kind"], one["metadata"]["name"]) for one in items}


def _definition(kind: str) -> Json:
    """Return the CustomResourceDefinition of the Prometheus operator's kind, without its schema."""
    plural = f"{kind.lower()}s"
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "scope": "Namespaced",
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_api(require_kubernetes(VERSION), tmp_path_factory.mktemp("api")) as api:
        cluster = Cluster(api)
        for name in _NAMESPACES:
            cluster.kubectl("create", "namespace", name)
        for kind in _CRDS:
            cluster.kubectl("apply", "-f", "-", text=json.dumps(_definition(kind)))
        cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        yield cluster


def data_of(cluster: Cluster) -> dict[str, str]:
    return dict(cluster.get(CA).get("data") or {})


def test_api_server_finds_no_unknown_field(cluster: Cluster) -> None:
    objects = [*chart_objects(EVERYTHING, version=VERSION).values()]
    for one in objects:
        if one["kind"] == "ConfigMap":
            one["data"] = {name: json.dumps(value) for name, value in one.get("data", {}).items()}
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    output = cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", text=text)
    assert output.count("(server dry run)") == len(objects) > 40


def test_life_of_an_installation(cluster: Cluster) -> None:
    """The CA survives upgrades and rollbacks, and nothing remains in the end."""
    own = {**EVERYTHING, "ca": {}}
    notes = cluster.helm("install", str(CHART), values=own)
    assert "rollout status deployment/certmount-authority daemonset/certmount-node" in notes
    installed = cluster.labelled()
    rendered = {(kind, name.removesuffix("hash")) for kind, _, name in chart_objects(own, version=VERSION)}
    assert {(kind, re.sub("(certmount-reload-).*", r"\1", name)) for kind, name in installed} == rendered
    # The authority writes its state into objects of the chart.
    state = {"data": {"root.crt": base64.b64encode(b"root").decode()}}
    cluster.api.call("PATCH", CA, json.dumps(state).encode(), content_type="application/merge-patch+json")

    cluster.helm("upgrade", str(CHART), values={"authority": {"replicas": 3}})
    assert data_of(cluster) == state["data"]
    deployment = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/certmount-authority"
    assert cluster.get(deployment)["spec"]["replicas"] == 3
    assert ("Deployment", "certmount-secrets") not in cluster.labelled()

    cluster.helm("rollback")
    assert data_of(cluster) == state["data"]
    assert cluster.get(deployment)["spec"]["replicas"] == 2
    assert cluster.labelled() == installed

    cluster.helm("uninstall")
    assert cluster.labelled() == set()
    with pytest.raises(Rejected, match="not found"):
        cluster.get(CA)


def test_existing_ca_survives_the_uninstallation(cluster: Cluster) -> None:
    cluster.kubectl("-n", NAMESPACE, "create", "secret", "generic", "own-ca", "--from-literal=root.crt=root")
    cluster.helm("install", str(CHART), values={"ca": {"existingSecret": "own-ca"}})
    cluster.helm("uninstall")
    assert cluster.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/own-ca")["data"] == {"root.crt": "cm9vdA=="}


def test_second_installation_is_refused(cluster: Cluster) -> None:
    """The name of the CSI driver is unique in the cluster."""
    cluster.helm("install", str(CHART), values={})
    try:
        flags = (f"--kube-apiserver={cluster.api.url}", f"--kube-ca-file={cluster.api.ca}", f"--kube-token={ADMIN}")
        with pytest.raises(HelmError, match="exists and cannot be imported into the current release"):
            helm("install", "second", str(CHART), "--namespace=web", *flags)
    finally:
        cluster.helm("uninstall")


def test_helm_takes_over_an_installation_of_the_kustomization(cluster: Cluster) -> None:
    """The CA that the authority created remains."""
    cluster.kubectl("apply", "-k", str(CHART.parent))
    state = {"data": {"root.crt": base64.b64encode(b"root").decode()}}
    cluster.api.call("PATCH", CA, json.dumps(state).encode(), content_type="application/merge-patch+json")
    before = cluster.get(CA)["metadata"]["uid"]
    cluster.helm("install", str(CHART), "--take-ownership", "--force-conflicts", values={})
    assert (cluster.get(CA)["metadata"]["uid"], data_of(cluster)) == (before, state["data"])
    cluster.helm("uninstall")
    assert cluster.labelled() == set()
