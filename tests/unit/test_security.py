"""SECURITY.md matches the code and the manifests."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.authority.authn.limits import Rate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()
_RESOURCES = PAGE[PAGE.index("## Shared resources") : PAGE.index("## Permissions")]
_ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in _RESOURCES.splitlines()
    if line.startswith("| ") and not line.startswith(("| resource", "| ---"))
]
_CAPACITIES = re.findall(r"`([a-z0-9_.]+):([A-Z0-9_]+)` = ([^;|]+?)(?=;| \|)", _RESOURCES)
_UNITS = {"KiB": 1024, "MiB": 1024 * 1024}
# Modules that pass a capacity on; the callers' constants are in the table.
_INDIRECT = {
    "authority.issuers.acme.order_shares": {"MAX_ORDERS", "MAX_PROCESSED", "MAX_FAILURES", "MAX_CERTIFICATE_BYTES"},
    "authority.issuers.fair_slots": {"MAX_SIGNING"},
    "kube.cache_shares": {
        "MAX_POD_BYTES",
        "MAX_SERVICE_BYTES",
        "MAX_NAMESPACE_BYTES",
        "MAX_CSR_CACHE_BYTES",
        "MAX_REQUEST_CACHE_BYTES",
    },
    "node.issuance.issuer_queue": {"MAX_FIRST_REQUESTS", "MAX_EXTERNAL_FIRST_REQUESTS"},
    "node.issuance.pending_requests": {"MAX_PENDING_REQUESTS"},
    "node.issuance.shared_certificates": {"MAX_SHARED_CERTIFICATES"},
}


def _value(text: str) -> object:
    if rate := re.fullmatch(r"([0-9.]+)/s, burst ([0-9]+)", text):
        return Rate(float(rate[1]), int(rate[2]))
    number, _, unit = text.partition(" ")
    return float(number) * _UNITS[unit] if unit else float(number)


@pytest.mark.parametrize("module, name, text", _CAPACITIES)
def test_capacity_is_that_of_the_code(module: str, name: str, text: str) -> None:
    value = getattr(importlib.import_module(f"csi_driver.{module}"), name)
    assert value == _value(text)


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row[0])
def test_each_row_is_complete_and_has_a_test(row: list[str]) -> None:
    _, where, capacity, shared_by, _, test = row
    assert set(where.split(", ")) <= {"authority", "node", "secrets"}
    assert capacity
    assert shared_by
    file, _, name = test.partition("::")
    assert re.search(rf"def {re.escape(name)}\(", (ROOT / "tests" / file).read_text()), test


def _uses() -> Iterator[tuple[str, ast.Call]]:
    """Yield all uses of a share or a rate limit with the module."""
    for file in sorted((ROOT / "csi_driver").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT / "csi_driver").with_suffix("").parts)
        calls = (found for found in ast.walk(ast.parse(file.read_text())) if isinstance(found, ast.Call))
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id in ("FairShares", "RateLimiter"):
                yield module, call


def test_all_shares_and_rate_limits_are_in_the_table() -> None:
    listed = {name for _, name, _ in _CAPACITIES}
    uses = list(_uses())
    assert len(uses) > 20
    for module, use in uses:
        arguments = [*use.args, *(keyword.value for keyword in use.keywords)]
        names = {part.id for one in arguments for part in ast.walk(one) if isinstance(part, ast.Name)}
        constants = {name for name in names if name.isupper()} or _INDIRECT.get(module, set())
        assert constants, f"{module}: {ast.unparse(use)} has no public constant as its capacity"
        assert constants <= listed, f"{module}: {ast.unparse(use)} is not in the table of SECURITY.md"


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy" / name).read_text()))


def _manifests() -> list[Path]:
    """Return all manifests except the Helm chart, which is compared with them in tests/peers/test_chart.py."""
    return [file for file in (ROOT / "deploy").rglob("*.yaml") if ROOT / "deploy/chart" not in file.parents]


def _pod(name: str) -> dict[str, Any]:
    found = next(one for one in _documents(name) if one["kind"] in ("Deployment", "DaemonSet"))
    pod: dict[str, Any] = found["spec"]["template"]["spec"]
    return pod


def test_pods_are_as_restricted_as_the_page_says() -> None:
    authority, node = _pod("base/authority.yaml"), _pod("base/node.yaml")
    restricted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    for pod in (authority, _pod("components/secrets/controller.yaml")):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == restricted
        assert all(mount["readOnly"] for mount in container["volumeMounts"])
    assert not {"hostNetwork", "hostPID", "hostIPC"} & (authority.keys() | node.keys())
    assert node["automountServiceAccountToken"] is False
    (container,) = node["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")}
    assert mounts == {"kubelet": "/var/lib/kubelet"}


def test_only_the_component_for_reload_signals_gives_the_driver_the_process_ids_of_the_host() -> None:
    found = [path for path in _manifests() if "hostPID" in path.read_text()]
    assert found == [ROOT / "deploy/components/reload/kustomization.yaml"]
    assert (ROOT / "deploy/components/reload/namespaces.env").read_text() == "namespaces=\n"


def test_only_the_monitoring_namespace_reaches_the_metrics() -> None:
    """Network plugins always allow the kubelet's probes."""
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    policies = [*_documents("base/network-policy.yaml"), *_documents("components/secrets/network-policy.yaml")]
    rules = [rule for policy in policies for rule in policy["spec"]["ingress"]]
    assert all(rule["from"] for rule in rules)
    ports = {port["port"] for rule in rules if rule["from"] == [monitoring] for port in rule["ports"]}
    assert ports == {9440, 9441, 9442}
    assert {port["port"] for rule in rules for port in rule["ports"]} == {*ports, 8443}


def _granted(*files: str) -> Iterator[str]:
    """Yield the permissions of manifests, as the page writes them: one for each resource."""
    verbs: dict[str, set[str]] = {}
    for document in (one for file in files for one in yaml.safe_load_all((ROOT / "deploy" / file).read_text())):
        if document["kind"] in ("Role", "ClusterRole"):
            own = document["metadata"].get("namespace", "NAMESPACE")
            namespace = f"{own}/" if document["kind"] == "Role" else ""
            for rule in document["rules"]:
                for resource in rule["resources"]:
                    for name in rule.get("resourceNames", [""]):
                        group = f".{rule['apiGroups'][0]}" if rule["apiGroups"][0] else ""
                        verbs.setdefault(f"{resource}{group} {namespace}{name}".strip(), set()).update(rule["verbs"])
    for resource, allowed in verbs.items():
        yield f"{', '.join(sorted(allowed))} {resource}"


_ROLES = {
    "### The authority": ["base/authority.yaml"],
    "### The component pod-certificates": [
        "components/pod-certificates/rbac.yaml",
        "components/roots-namespace/role.yaml",
    ],
    "### The Secrets controller": [
        "components/secrets-namespace/role.yaml",
        "components/secrets/controller.yaml",
        "overlay-example-secrets/list.yaml",
    ],
}


@pytest.mark.parametrize("title, files", _ROLES.items())
def test_permissions_are_those_of_the_manifests(title: str, files: list[str]) -> None:
    section = re.split(r"^##+ ", PAGE[PAGE.index(f"{title}\n") + 4 :], maxsplit=1, flags=re.MULTILINE)[0]
    assert sorted(re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)) == sorted(_granted(*files))


def test_no_other_manifest_grants_permissions() -> None:
    deploy = ROOT / "deploy"
    with_roles = {str(file.relative_to(deploy)) for file in _manifests() if "kind: Role" in file.read_text()}
    assert with_roles == {file for files in _ROLES.values() for file in files}
