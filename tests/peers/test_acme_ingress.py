"""HTTP-01 with Ingress objects, which a minimal controller translates into nginx's configuration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from csi_driver.authority.issuers.acme.config import Http01
from csi_driver.core.errors import CertmountError
from csi_driver.kube.connection import Api, ApiConfiguration
from csi_driver.kube.ingress import IngressRoutes
from tests.peers.acme import acme_environment, challenge_server, dns_names, request_for, running_issuers
from tests.peers.nginx import Nginx
from tests.peers.processes import LOOPBACK
from tests.support.stream_servers import web_server
from tests.support.waiting import until

_NAMES = ("shop.example.test", "www.example.test")


@dataclass
class Cluster:
    """A fake API server for Ingresses."""

    ingresses: dict[str, Any] = field(default_factory=dict)
    made: int = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Api]:
        async with (
            web_server(self._handle) as port,
            Api(ApiConfiguration(url=f"http://{LOOPBACK}:{port}")) as api,
        ):
            yield api

    async def _handle(self, request: web.Request) -> web.Response:
        collection, _, name = request.path.partition("/ingresses")
        if collection != "/apis/networking.k8s.io/v1/namespaces/certmount":
            return web.json_response({"message": "not found"}, status=404)
        if request.method == "DELETE":
            found = self.ingresses.pop(name.removeprefix("/"), None)
            return web.json_response(
                {"message": "not found"} if found is None else {}, status=404 if found is None else 200
            )
        body = await request.json()
        if body["metadata"]["name"] in self.ingresses:
            return web.json_response({"message": "already exists"}, status=409)
        self.ingresses[body["metadata"]["name"]] = body
        self.made += 1
        return web.json_response(body, status=201)


def locations(ingresses: Iterable[Any], backends: Mapping[tuple[str, int], str]) -> str:
    lines = []
    for ingress in ingresses:
        assert ingress["spec"]["ingressClassName"] == "nginx"
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                assert path["pathType"] == "Exact"
                service = path["backend"]["service"]
                address = backends[service["name"], service["port"]["number"]]
                lines.append(f"location = {path['path']} {{ proxy_pass http://{address}; }}")
    return "\n".join(lines)


@pytest.mark.peers("pebble", "named", "nginx", "openssl")
async def test_each_challenge_gets_an_ingress_that_is_deleted_afterwards(tmp_path: Path) -> None:
    cluster, nginx = Cluster(), Nginx(tmp_path / "nginx", "")
    async with (
        cluster.running() as api,
        acme_environment(tmp_path, http_port=nginx.port) as env,
    ):
        routes = IngressRoutes(api, "certmount", "certmount-authority", 8089, "nginx")
        http01 = Http01(self_test=nginx.address, ingress_class="nginx")
        issuer = env.issuer(replace(env.configuration, dns01=None, http01=http01), routes=routes)
        async with challenge_server(issuer) as port, running_issuers(issuer):
            issuing = asyncio.ensure_future(issuer.issue(request_for(*_NAMES)))
            await until(lambda: len(cluster.ingresses) == len(_NAMES), "an Ingress for each name")
            backends = {("certmount-authority", 8089): f"{LOOPBACK}:{port}"}
            async with replace(nginx, locations=locations(cluster.ingresses.values(), backends)).running():
                assert dns_names((await issuing).chain) == set(_NAMES)
    assert cluster.ingresses == {}
    assert cluster.made == len(_NAMES)


async def test_routes_are_idempotent_and_report_api_errors() -> None:
    cluster = Cluster()
    async with cluster.running() as api:
        routes = IngressRoutes(api, "certmount", "certmount-authority", 8089, "nginx")
        for _ in range(2):
            await routes.open("shop.example.test", "token")
        assert cluster.made == 1
        for _ in range(2):
            await routes.close("shop.example.test", "token")
        assert cluster.ingresses == {}
        elsewhere = IngressRoutes(api, "nowhere", "certmount-authority", 8089, "nginx")
        with pytest.raises(CertmountError, match=r"Ingress for shop\.example\.test"):
            await elsewhere.open("shop.example.test", "token")
