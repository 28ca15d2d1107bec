"""``certmount status`` against a real API server, a real authority and a real driver."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.doctor.test_doctor import page_of_node
from tests.integration.doctor.world import NODE, NODE_POD, POLICY, ROOT, Installation, TestPod, on_terminal
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="package")
PODS = "/api/v1/namespaces/certmount/pods"


@contextlib.asynccontextmanager
async def published(installation: Installation, *names: str, **attributes: str) -> AsyncIterator[list[Path]]:
    """Publish a volume of each pod of the account web/edge, and unpublish it afterwards."""
    pods = [TestPod("web", name, "edge", issuer=installation.issuer) for name in names]
    paths = [
        await installation.publish(pod, {key.replace("_", "-"): text for key, text in attributes.items()})
        for pod in pods
    ]
    try:
        yield paths
    finally:
        for pod in pods:
            await installation.unpublish(pod)


async def test_status_of_a_healthy_installation(installation: Installation) -> None:
    async with published(installation, "edge-0", dns_names="api.example.com") as (path,):
        summary = json.loads((path / "generation.json").read_text())
        result = await asyncio.to_thread(installation.run, "status")
        assert (result.status, result.errors) == (0, ""), result.output
        sections = result.output.split("\n\n")
        assert sections[0].splitlines()[0] == "problems: 0"
        assert sections[0].splitlines()[1].startswith("authority: 1 of 1 ready, version 0.1.0, policy ")
        assert sections[0].splitlines()[2] == "node drivers: 1 of 1 ready, version 0.1.0, 1 connected"
        assert sections[0].splitlines()[3].startswith("CA: steady, its intermediate expires at ")
        assert sections[1] == "ISSUER\tENVIRONMENT\tSTATE\ninternal\tinternal\tok"
        names = "api.example.com,spiffe://cluster.local/ns/web/sa/edge"
        times = [summary["not_after"], summary["renew_at"]]
        row = ["web", "edge-0", "tls", "ok", *times, "internal", NODE, names, summary["serial"]]
        assert sections[3].splitlines()[1:] == ["\t".join(row)]


async def test_problems_are_first_and_set_the_exit_status(installation: Installation) -> None:
    policy = installation.files / "policy.yaml"
    names = {"dns_names": "api.example.com", "duration": "10s"}
    async with published(installation, "edge-0", "edge-1", **names), published(installation, "aaa"):
        policy.write_text("policy: []\n")
        try:

            def states() -> list[str]:
                rows = installation.run("status", "web").output.split("\n\n")[-1].splitlines()[1:]
                return [row.split("\t")[3] for row in rows]

            while (await asyncio.to_thread(states)).count("ok") > 1:
                pass
            result = await asyncio.to_thread(installation.run, "status")
            assert result.status == 1
            lines = result.output.splitlines()
            where = f"pod web/edge-0 volume tls on {NODE}"
            assert lines[0] == "problems: 2"
            assert lines[1].startswith(f"  {where}: the ")
            assert "no policy rule allows this name for service account web/edge" in lines[1]
            certificates = result.output.split("\n\n")[-1].splitlines()[1:]
            assert [line.split("\t")[1] for line in certificates] == ["edge-0", "edge-1", "aaa"]
        finally:
            policy.write_text(POLICY)


async def test_documented_role_is_sufficient_and_has_no_access_to_secrets(installation: Installation) -> None:
    result = installation.run("status", user="jane")
    assert result.status == 1
    problem = "you do not have the permission to list pods in namespace certmount"
    fix = "use a kubeconfig that has it, see docs/commands.md"
    assert result.errors == f"Error: APIServerUnavailable: {problem}; {fix}\n"
    text = (ROOT / "docs/commands.md").read_text()
    role = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    path = "/apis/rbac.authorization.k8s.io/v1/namespaces/certmount"
    installation.api.call("POST", f"{path}/roles", role)
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]}
    subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "jane"}
    binding = {"metadata": {"name": "jane"}, "roleRef": reference, "subjects": [subject]}
    installation.api.call("POST", f"{path}/rolebindings", binding)
    try:
        result = installation.run("status", user="jane")
        assert (result.status, result.errors) == (0, "")
        resources = [resource for rule in role["rules"] for resource in rule["resources"]]
        assert resources == ["pods", "pods/portforward"]
    finally:
        installation.api.call("DELETE", f"{path}/rolebindings/jane")
        installation.api.call("DELETE", f"{path}/roles/{role['metadata']['name']}")


async def test_driver_that_does_not_answer_is_a_problem(installation: Installation) -> None:
    await installation.driver.stop()
    try:
        result = installation.run("status", "--problems")
        lines = result.output.splitlines()
        assert (result.status, lines[0]) == (1, "problems: 1")
        assert lines[1].startswith(
            f"  node driver {NODE_POD} on {NODE}: APIServerUnavailable: pod certmount/{NODE_POD}: error "
        )
    finally:
        await installation.driver.start()
        await installation.driver_kubelet.register()
        await until(lambda: not installation.run("status", "-o", "json").document["problems"], "the trust stream", 60.0)


def certificate(number: int) -> dict[str, Any]:
    return {
        "namespace": "load",
        "pod": f"pod-{number}",
        "volume": "tls",
        "node": NODE,
        "names": ["spiffe://cluster.local/ns/load/sa/load"],
        "moreNames": 0,
        "serial": f"{number:040x}",
        "issuer": "internal",
        "interim": False,
        "notAfter": "2026-11-28T02:47:29Z",
        "nextRenewal": "2026-11-27T17:18:58Z",
        "condition": None,
    }


_PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""
WITH_PEAK_MEMORY = (sys.executable, "-c", _PEAK_MEMORY)
"""Runs a command, and prints its peak memory in KiB."""


async def test_ten_thousand_pods(installation: Installation) -> None:
    """A hundred nodes with a hundred pods each: the pods of the driver are listed in pages, and read twenty at a time."""
    per_node = [certificate(number) for number in range(100)]
    page = {"version": "0.1.0", "time": 0.0, "node": NODE, "problems": [], "certificates": per_node}
    template = installation.api.call("GET", f"{PODS}/{NODE_POD}")
    names = [f"certmount-node-load-{number}" for number in range(100)]
    with page_of_node(installation, json.dumps(page).encode()):
        installation.kubelet.ports |= dict.fromkeys(names, installation.kubelet.ports[NODE_POD])
        try:
            for name in names:
                spec = template["spec"]
                metadata = {"name": name, "labels": template["metadata"]["labels"]}
                await asyncio.to_thread(installation.api.call, "POST", PODS, {"metadata": metadata, "spec": spec})
                status = {"status": template["status"]}
                await asyncio.to_thread(installation.patch, f"{PODS}/{name}/status", status)
            result = await asyncio.to_thread(installation.run, "status", "-o", "json", within=WITH_PEAK_MEMORY)
            assert len(result.document["certificates"]) == 101 * 100
            peak_mb = int(result.errors.split()[-1]) / 1024
            print(f"peak memory: {peak_mb:.0f} MB")
            assert peak_mb < 300
        finally:
            for name in names:
                await asyncio.to_thread(installation.api.call, "DELETE", f"{PODS}/{name}?gracePeriodSeconds=0")


async def test_colors_and_tables_are_on_a_terminal_only(installation: Installation) -> None:
    text = on_terminal(installation, "status")
    assert text.startswith("\x1b[32mproblems: 0\x1b[0m\n")
    assert "ISSUER    ENVIRONMENT  STATE\ninternal  internal     ok\n" in text
    assert on_terminal(installation, "status", NO_COLOR="1").startswith("problems: 0\n")
