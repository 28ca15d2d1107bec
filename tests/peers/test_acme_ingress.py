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
from kubernetes.aio import client

from csi_driver.authority.issuers.acme.config import Http01
from csi_driver.authority.issuers.acme.http01 import ChallengeServer
from csi_driver.core.errors import CertmountError
from csi_driver.kube.client import connect
from csi_driver.kube.ingress import IngressRoutes
from tests.peers.acme import acme_environment, dns_names, request_for, running_issuers
from tests.peers.nginx import Nginx
from tests.peers.processes import LOOPBACK
from tests.support.waiting import until

_COLLECTION = "/apis/networking.k8s.io/v1/namespaces/certmount/ingresses"
_NAMES = ("shop.example.test", "www.example.test")


@dataclass
class Cluster:
    """A fake API server for Ingresses."""

    ingresses: dict[str, Any] = field(default_factory=dict)
    made: int = 0
    url: str = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        application = web.Application()
        application.router.add_post(_COLLECTION, self._create)
        application.router.add_delete(_COLLECTION + "/{name}", self._delete)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, LOOPBACK, 0).start()
        self.url = f"http://{LOOPBACK}:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["metadata"]["name"]
        if name in self.ingresses:
            return web.json_response({"message": "already exists"}, status=409)
        self.ingresses[name] = body
        self.made += 1
        return web.json_response(body, status=201)

    async def _delete(self, request: web.Request) -> web.Response:
        if self.ingresses.pop(request.match_info["name"], None) is None:
            return web.json_response({"message": "not found"}, status=404)
        return web.json_response({"status": "Success"})


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
        cluster.running(),
        connect(client.Configuration(host=cluster.url)) as api,
        acme_environment(tmp_path, http_port=nginx.port) as env,
    ):
        routes = IngressRoutes(api, "certmount", "certmount-authority", 8089, "nginx")
        http01 = Http01(self_test=nginx.address, ingress_class="nginx")
        configuration = replace(env.configuration, dns01=None, http01=http01)
        issuer = env.issuer(configuration, routes=routes)
        server = ChallengeServer(f"{LOOPBACK}:0", lambda: (issuer,))
        port = await server.start()
        try:
            async with running_issuers(issuer):
                issuing = asyncio.ensure_future(issuer.issue(request_for(*_NAMES)))
                await until(lambda: len(cluster.ingresses) == len(_NAMES), "an Ingress for each name")
                backends = {("certmount-authority", 8089): f"{LOOPBACK}:{port}"}
                async with replace(nginx, locations=locations(cluster.ingresses.values(), backends)).running():
                    assert dns_names((await issuing).chain) == set(_NAMES)
        finally:
            await server.stop()
    assert cluster.ingresses == {}
    assert cluster.made == len(_NAMES)


async def test_routes_are_idempotent_and_report_api_errors() -> None:
    cluster = Cluster()
    async with cluster.running(), connect(client.Configuration(host=cluster.url)) as api:
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
