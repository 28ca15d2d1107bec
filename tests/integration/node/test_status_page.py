"""The pages of the driver for ``certmount status`` and ``certmount doctor``: what they contain, and what never."""

from __future__ import annotations

import json
from typing import Any

import pytest

from csi_driver import __version__
from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.world import Node
from tests.support.kubelet import FakePod
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def page(node: Node, path: str) -> Any:
    status, text = node.driver.get(path)
    assert status == 200, text
    return json.loads(text)


async def test_status_has_each_volume_with_its_certificate(node: Node) -> None:
    await node.kubelet.register()
    pod = FakePod(namespace="web", name="edge-0", service_account="edge")
    request = await node.published(pod, {"dns-names": "edge.web.svc, api.example.com"})
    document, leaf = page(node, "/status"), node.shown(request).leaf
    assert (document["version"], document["node"], document["problems"]) == (__version__, "node1", [])
    (certificate,) = document["certificates"]
    assert certificate == {
        "namespace": "web",
        "pod": "edge-0",
        "volume": "tls",
        "node": "node1",
        "names": ["edge.web.svc", "api.example.com", "spiffe://cluster.local/ns/web/sa/edge"],
        "moreNames": 0,
        "serial": f"{leaf.serial_number:x}",
        "issuer": "internal",
        "interim": False,
        "notAfter": f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        "nextRenewal": json.loads(node.target(request, "generation.json").read_text())["renew_at"],
        "condition": None,
    }


async def test_status_bounds_the_names_of_a_certificate(node: Node) -> None:
    await node.published(FakePod(), {"dns-names": ", ".join(f"n{number}.web.svc" for number in range(40))})
    (certificate,) = page(node, "/status")["certificates"]
    assert certificate["names"] == [f"n{number}.web.svc" for number in range(10)]
    assert certificate["moreNames"] == 31


async def test_status_has_the_reason_of_a_failed_renewal(node: Node) -> None:
    request = await node.published(FakePod(name="edge-1"), {"duration": "10s"})
    node.script.failure = CertmountError(Reason.NAME_NOT_ALLOWED, "dns-names[0]: is not allowed")

    def condition() -> Any:
        return page(node, "/status")["certificates"][0]["condition"]

    await until(condition, "a failed renewal")
    assert condition()["reason"] in ("NameNotAllowed", "CertificateExpired")
    assert "dns-names[0]: is not allowed" in condition()["message"]
    assert node.target(request, "site.key").exists()


async def test_status_has_no_keys_tokens_or_passwords(node: Node) -> None:
    pod = FakePod()
    request = await node.published(pod, {"files": "java"})
    text = node.driver.get("/status")[1] + node.driver.get("/diagnostics")[1]
    password = node.target(request, "keystore.password").read_text()
    token = node.authority.token_file.read_text()
    for secret in (password, token, "PRIVATE KEY", pod.token().split(".")[1]):
        assert secret not in text


async def test_diagnostics_connect_to_the_authority(node: Node) -> None:
    await node.kubelet.register()
    document = page(node, "/diagnostics")
    assert document["problems"] == []
    assert document["authority"] == f"{node.authority.address} is at 127.0.0.1"
    await node.authority.stop()
    (problem,) = page(node, "/diagnostics")["problems"]
    hint = "check that its pods are ready"
    assert problem == f"AuthorityUnavailable: {node.authority.address}: connection refused; {hint}"
