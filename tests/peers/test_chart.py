"""The Helm chart renders the same objects as the kustomizations, and rejects values that it does not know."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver import __version__
from tests.support.manifests import (
    CHART,
    DEPLOY,
    NAMESPACE,
    HelmError,
    Key,
    Object,
    chart_objects,
    helm,
    kustomized_objects,
    write_kustomization,
)

pytestmark = pytest.mark.peers("helm", "kustomize")

BASE, COMPONENTS = DEPLOY / "base", DEPLOY / "components"
_NAMESPACE_OBJECT: Key = ("Namespace", "", NAMESPACE)
_DEPLOYMENT: Key = ("Deployment", NAMESPACE, "certmount-authority")
_DAEMON_SET: Key = ("DaemonSet", NAMESPACE, "certmount-node")
_CONTROLLER: Key = ("Deployment", NAMESPACE, "certmount-secrets")
Values = Mapping[str, Any]
EVERYTHING: Values = {
    "image": {
        "repository": "registry.example.com/certmount",
        "digest": f"sha256:{'0' * 64}",
        "pullSecrets": ["registry"],
    },
    "policy": [{"match": {"namespaces": ["web"], "serviceAccounts": ["edge"]}, "allow": {"dns": ["*.example.com"]}}],
    "deny": [{"match": {"namespaces": ["old"], "serviceAccounts": ["*"]}, "reason": "moved to another cluster"}],
    "issuers": [
        {
            "name": "step",
            "step_ca": {
                "url": "https://ca.example.com:9000",
                "root_sha256": "0" * 64,
                "provisioner": "certmount",
                "key": {"secret": "certmount/step-provisioner", "key": "jwk"},
                "password": {"secret": "vault/step-password", "key": "password"},
            },
        },
        {
            "name": "letsencrypt",
            "acme": {
                "account": {"secret": "certmount/letsencrypt"},
                "directory": "https://acme-v02.api.letsencrypt.org/directory",
                "terms_agreed": True,
                "dns01": {
                    "server": "192.0.2.1",
                    "tsig": {"secret": "certmount/dns-update", "key": "tsig"},
                    "tsig_secrets": ["shop/tsigkey"],
                },
            },
        },
    ],
    "issuerFiles": {"staging-roots.pem": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"},
    "federations": {"partner": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"},
    "ca": {"existingSecret": "own-ca"},
    "secrets": {"namespaces": ["shop", "web"], "lists": ["shop/list"], "ingressClasses": ["nginx"], "gateways": True},
    "podCertificates": {"signers": ["certmount.dev/pod", "certmount.dev/step=step"], "rootsNamespaces": ["web"]},
    "reload": {"namespaces": ["web", "shop"]},
    "autocert": {"issuer": "step"},
    "monitoring": {"podMonitor": True, "rules": True, "dashboard": True, "labels": {"release": "prometheus"}},
    "logLevel": "debug",
    "logFormat": "logfmt",
    "global": {},
}
"""Values that render every object of the chart."""


def _default(_directory: Path) -> Path:
    return DEPLOY


def _example(_directory: Path) -> Path:
    return DEPLOY / "overlay-example"


def _secrets(_directory: Path) -> Path:
    return DEPLOY / "overlay-example-secrets"


def _pod_certificates(directory: Path) -> Path:
    return write_kustomization(directory, resources=[BASE], components=[COMPONENTS / "pod-certificates"])


def _reload(directory: Path) -> Path:
    component = shutil.copytree(COMPONENTS / "reload", directory / "reload")
    (component / "namespaces.env").write_text("namespaces=web,shop\n")
    return write_kustomization(directory, resources=[BASE], components=[component])


def _roots(directory: Path) -> Path:
    role = write_kustomization(directory / "web", namespace="web", resources=[COMPONENTS / "roots-namespace"])
    return write_kustomization(directory, resources=[BASE, role], components=[COMPONENTS / "pod-certificates"])


def _autocert(directory: Path) -> Path:
    return write_kustomization(directory, resources=[BASE], components=[COMPONENTS / "autocert"])


def _monitoring(directory: Path) -> Path:
    return write_kustomization(directory, resources=[BASE], components=[DEPLOY / "monitoring"])


def _kubernetes_1_35(_directory: Path) -> Path:
    return DEPLOY / "kubernetes-1.35"


_IMAGE = {"repository": "localhost/certmount", "tag": "dev"}
_EDGE = {"match": {"namespaces": ["web"], "serviceAccounts": ["edge"]}, "allow": {"dns": ["*.example.com"]}}
_SHOP = {
    "match": {"namespaces": ["shop"], "secrets": ["*"]},
    "allow": {"dns": ["example.com", "*.example.com"], "usages": ["server"]},
}
_CASES: list[tuple[Callable[[Path], Path], Values, str]] = [
    (_default, {}, "1.34.0"),
    (_example, {"image": _IMAGE, "policy": [_EDGE]}, "1.34.0"),
    (
        _secrets,
        {"image": _IMAGE, "policy": [_SHOP], "secrets": {"namespaces": ["shop"], "lists": ["shop/notariat-config"]}},
        "1.34.0",
    ),
    (_pod_certificates, {"podCertificates": {"signers": ["certmount.dev/pod"]}}, "1.34.0"),
    (_reload, {"reload": {"namespaces": ["web", "shop"]}}, "1.34.0"),
    (_roots, {"podCertificates": {"signers": ["certmount.dev/pod"], "rootsNamespaces": ["web"]}}, "1.34.0"),
    (_autocert, {"autocert": {"issuer": "internal"}}, "1.34.0"),
    (_monitoring, {"monitoring": {"podMonitor": True, "rules": True, "dashboard": True}}, "1.34.0"),
    (_kubernetes_1_35, {}, "1.35.2-gke.100"),
]


@pytest.mark.parametrize("kustomization, values, version", _CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_chart_and_kustomization_render_the_same_objects(
    kustomization: Callable[[Path], Path], values: Values, version: str, tmp_path: Path
) -> None:
    """The namespace is the exception: Helm creates it, without labels."""
    expected = kustomized_objects(kustomization(tmp_path))
    del expected[_NAMESPACE_OBJECT]
    rendered = chart_objects(values, version=version)
    assert rendered.keys() == expected.keys()
    for key, one in expected.items():
        assert rendered[key] == one, key


def _template(chart: Path, values: Values, namespace: str = NAMESPACE) -> str:
    flags = (f"--namespace={namespace}", "--kube-version=1.34.0")
    return helm("template", "certmount", str(chart), *flags, values=values)


def test_objects_follow_the_namespace_of_the_release() -> None:
    """No namespace remains fixed, in any object."""
    values = {**EVERYTHING, "issuers": [], "podCertificates": {"signers": ["certmount.dev/pod"]}}
    here, there = (
        helm("template", "certmount", str(CHART), "-n", name, values=values) for name in ("certmount", "pki")
    )
    moved = re.sub(r'namespace: ("?)certmount\1\n', r"namespace: \1pki\1\n", here).replace("=certmount/", "=pki/")
    moved = re.sub(r"certmount-authority\.certmount\.svc", "certmount-authority.pki.svc", moved)
    assert there == re.sub(r"in namespace\s+certmount\b", lambda found: found[0].replace("certmount", "pki"), moved)


def _documents(objects: Mapping[Key, Object], *keys: Key) -> list[Object]:
    return [objects[key]["spec"]["template"]["spec"] for key in keys]


def test_every_workload_uses_the_digest_and_the_pull_secrets() -> None:
    pods = _documents(chart_objects(EVERYTHING), _DEPLOYMENT, _DAEMON_SET, _CONTROLLER)
    image = f"registry.example.com/certmount@sha256:{'0' * 64}"
    assert [pod["containers"][0]["image"] for pod in pods] == [image] * 3
    assert [pod["imagePullSecrets"] for pod in pods] == [[{"name": "registry"}]] * 3
    logging = {"--log-level=debug", "--log-format=logfmt"}
    assert all(logging < set(pod["containers"][0]["args"]) for pod in pods)


def test_scheduling_values_reach_the_pods() -> None:
    placed = {
        "priorityClassName": "high",
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "resources": {"requests": {"cpu": "1"}},
    }
    values = {
        "authority": {
            **placed,
            "replicas": 3,
            "topologySpreadConstraints": [],
            "extraArgs": ["--ca-key-type=RSA-3072"],
        },
        "node": {
            **placed,
            "kubeletDir": "/var/snap/kubelet",
            "maxUnavailable": 1,
            "extraArgs": ["--default-key-type=RSA-3072"],
        },
        "secrets": {**placed, "namespaces": ["shop"], "topologySpreadConstraints": []},
    }
    objects = chart_objects(values)
    for pod in _documents(objects, _DEPLOYMENT, _DAEMON_SET, _CONTROLLER):
        (container,) = pod["containers"]
        found = {**{name: pod[name] for name in placed if name != "resources"}, "resources": container["resources"]}
        assert found["tolerations"] == placed["tolerations"]
        assert found["nodeSelector"].items() >= {"pool": "system"}.items()
        assert "topologySpreadConstraints" not in pod
        assert container["resources"]["requests"]["cpu"] == "1"
    assert objects[_DEPLOYMENT]["spec"]["replicas"] == 3
    assert objects[_DAEMON_SET]["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == 1
    driver = objects[_DAEMON_SET]["spec"]["template"]["spec"]
    (container,) = driver["containers"]
    assert {"--kubelet-dir=/var/snap/kubelet", "--default-key-type=RSA-3072"} < set(container["args"])
    assert container["volumeMounts"][0]["mountPath"] == driver["volumes"][0]["hostPath"]["path"] == "/var/snap/kubelet"


def test_authority_can_read_exactly_the_secrets_that_issuers_name() -> None:
    rules = {
        key[1]: one["rules"]
        for key, one in chart_objects(EVERYTHING).items()
        if key[::2] == ("Role", "certmount-issuers")
    }

    def rule(verbs: list[str], *names: str) -> Object:
        return {"apiGroups": [""], "resources": ["secrets"], "resourceNames": list(names), "verbs": verbs}

    assert rules == {
        "certmount": [rule(["get"], "dns-update", "step-provisioner"), rule(["get", "update"], "letsencrypt")],
        "shop": [rule(["get"], "tsigkey")],
        "vault": [rule(["get"], "step-password")],
    }


def test_existing_ca_secret_is_used_and_not_created() -> None:
    objects = chart_objects(EVERYTHING)
    assert not [key for key in objects if key[0] == "Secret" and key[2] in ("certmount-ca", "own-ca")]
    (pod,) = _documents(objects, _DEPLOYMENT)
    assert "--ca-secret=certmount/own-ca" in pod["containers"][0]["args"]
    rules = objects["Role", NAMESPACE, "certmount-authority"]["rules"]
    assert rules[0]["resourceNames"] == ["own-ca", "certmount-acknowledgements"]


def test_trust_bundles_of_all_root_sets_are_permitted() -> None:
    rules = chart_objects(EVERYTHING)["ClusterRole", "", "certmount-pod-certificates"]["rules"]
    assert rules[2]["resourceNames"] == ["certmount.dev/pod", "certmount.dev/step"]
    assert rules[3]["resourceNames"] == [
        f"certmount.dev:pod:{name}" for name in ("internal", "step", "letsencrypt", "partner")
    ]


def test_names_that_yaml_reads_as_other_types_stay_texts() -> None:
    names = ["no", "42", "1e3", "null", "on"]
    values = {
        **EVERYTHING,
        "secrets": {"namespaces": names, "lists": [f"{name}/{name}" for name in names], "defaultIssuer": "42"},
        "podCertificates": {"signers": ["certmount.dev/pod"], "rootsNamespaces": names},
        "networkPolicy": {"monitoringNamespace": "on"},
        "authority": {"priorityClassName": "1e3"},
    }
    rendered = chart_objects(values)
    assert {name for _, name, _ in rendered if name} == {NAMESPACE, "vault", "shop", *names}
    assert '"kubernetes.io/metadata.name": "on"' in json.dumps(list(rendered.values()))
    (authority, controller) = _documents(rendered, _DEPLOYMENT, _CONTROLLER)
    assert authority["priorityClassName"] == "1e3"
    environment = {one["name"]: one["value"] for one in controller["containers"][0]["env"]}
    assert environment["CERTMOUNT_SECRETS_DEFAULT_ISSUER"] == "42"
    assert environment["CERTMOUNT_SECRETS_NAMESPACES"].split() == names


def test_files_of_issuers_are_next_to_the_issuers_file() -> None:
    data = chart_objects(EVERYTHING)["ConfigMap", NAMESPACE, "certmount-issuers"]["data"]
    assert data.keys() == {"issuers.yaml", "staging-roots.pem"}
    assert data["staging-roots.pem"].startswith("-----BEGIN CERTIFICATE-----\n")


def test_network_policies_can_be_changed_or_omitted() -> None:
    values = {"networkPolicy": {"monitoringNamespace": "observability", "egressPorts": [443, 9000]}}
    policies = [one for key, one in chart_objects(values).items() if key[0] == "NetworkPolicy"]
    assert len(policies) == 2
    text = json.dumps(policies)
    assert text.count('"observability"') == 2
    assert '{"ports": [{"port": 443}, {"port": 9000}]}' in text
    assert not [key for key in chart_objects({"networkPolicy": {"enabled": False}}) if key[0] == "NetworkPolicy"]


def test_alerts_and_dashboard_select_the_jobs_of_the_pod_monitor() -> None:
    objects = chart_objects(EVERYTHING)
    rule, dashboard = (
        objects["PrometheusRule", NAMESPACE, "certmount"],
        objects["ConfigMap", NAMESPACE, "certmount-dashboard"],
    )
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    monitor = objects["PodMonitor", NAMESPACE, "certmount"]["spec"]
    (expression,) = monitor["selector"]["matchExpressions"]
    assert (monitor["jobLabel"], expression["key"]) == ("app.kubernetes.io/name",) * 2
    jobs = set(re.findall(r'job="([^"]+)"', json.dumps([rule["spec"], dashboard["data"]]).replace("\\", "")))
    assert jobs
    assert jobs <= set(expression["values"])
    for name in expression["values"]:
        (workload,) = [one for key, one in objects.items() if key[2] == name and key[0] in ("Deployment", "DaemonSet")]
        template = workload["spec"]["template"]
        assert template["metadata"]["labels"]["app.kubernetes.io/name"] == name
        (port,) = monitor["podMetricsEndpoints"]
        assert port["port"] in [one["name"] for one in template["spec"]["containers"][0]["ports"]]


_REJECTED: list[tuple[Values, str]] = [
    ({"authority": {"replica": 3}}, "at '/authority': additional properties 'replica' not allowed"),
    (
        {"image": {"digest": "sha256:12"}},
        "at '/image/digest': 'sha256:12' does not match pattern '^(sha256:[0-9a-f]{64})?$'",
    ),
    ({"policy": [{"match": {"namespace": "web"}}]}, "additional properties 'namespace' not allowed"),
    (
        {"policy": [{"match": {"namespaces": ["**"]}, "allow": {"dns": ["**"]}}]},
        "at '/policy/0/allow/dns/0': 'not' failed",
    ),
    (
        {"issuers": [{"name": "internal", "kubernetes_csr": {"signer": "example.com/pods"}}]},
        "at '/issuers/0/name': 'not' failed",
    ),
    ({"podCertificates": {"signers": ["example.com/pod"]}}, "at '/podCertificates/signers/0'"),
    ({"image": {"repository": "registry.example.com/certmount:dev"}}, "at '/image/repository'"),
    ({"node": {"priorityClassName": "a\n        - name: b"}}, "at '/node/priorityClassName'"),
    ({"node": {"kubeletDir": "/var/lib/kubelet # b"}}, "at '/node/kubeletDir'"),
    ({"ca": {"existingSecret": "a\n        - --check"}}, "at '/ca/existingSecret'"),
    (
        {"issuerFiles": {"issuers.yaml": EVERYTHING["issuerFiles"]["staging-roots.pem"]}},
        "'issuers.yaml' does not match pattern",
    ),
    ({"image": None}, "at '': missing property 'image'"),
    ({"monitoring": None}, "at '': missing property 'monitoring'"),
    ({"secrets": {"lists": ["web/certificates"]}}, "secrets.lists: needs secrets.namespaces"),
    (
        {"podCertificates": {"rootsNamespaces": ["web"]}},
        "podCertificates.rootsNamespaces: needs podCertificates.signers",
    ),
    ({"secrets": {"namespaces": ["certmount"]}}, "secrets.namespaces: certmount is the namespace of certmount itself"),
]


@pytest.mark.parametrize("values, text", _REJECTED, ids=range(len(_REJECTED)))
def test_wrong_values_are_rejected(values: Values, text: str) -> None:
    with pytest.raises(HelmError) as error:
        chart_objects(values)
    assert text in str(error.value)


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["default", "everything"])
def test_helm_lint_has_no_complaint(values: Values) -> None:
    helm("lint", "--strict", str(CHART), values=values)


def test_each_value_is_described() -> None:
    """The schema, values.yaml and the table of the README have the same values."""
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    table = re.findall(r"^\| (?:`|\*\*)([\w.]+)(?:`|\*\*) \|", (CHART / "README.md").read_text(), flags=re.MULTILINE)
    expected = []
    for name, default in values.items():
        expected.append(name)
        if any("description" in one for one in schema[name].get("properties", {}).values()):
            assert schema[name]["properties"].keys() == default.keys()
            expected += [f"{name}.{inner}" for inner in default]
    assert schema.keys() == values.keys() | {"global"}
    assert table == expected


def test_one_version_everywhere() -> None:
    """The version of the package is that of the chart, of its image and of the kustomization's image."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    (pod,) = _documents(kustomized_objects(DEPLOY), _DEPLOYMENT)
    assert pod["containers"][0]["image"] == f"ghcr.io/certmount/certmount:{__version__}"


def test_package_contains_the_files_that_templates_read(tmp_path: Path) -> None:
    helm("package", str(CHART), f"--destination={tmp_path}")
    package = tmp_path / f"certmount-{__version__}.tgz"
    assert _template(package, EVERYTHING) == _template(CHART, EVERYTHING)
