"""HTTP-01 by Ingress objects: a small controller, as clusters have them, makes nginx's configuration of what it finds."""

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

from csi_driver.authority.issuers.acme.challenge_server import ChallengeServer
from csi_driver.authority.issuers.acme.settings import Http01
from csi_driver.core.errors import CertmountError
from csi_driver.kube.client import connect
from csi_driver.kube.ingress import IngressRoutes
from tests.peers.acme import at_work, dns_names, order_for, site
from tests.peers.nginx import Nginx
from tests.peers.processes import LOOPBACK
from tests.support.waiting import until

_COLLECTION = "/apis/networking.k8s.io/v1/namespaces/certmount/ingresses"
_NAMES = ("shop.example.test", "www.example.test")


@dataclass
class Cluster:
    """The part of an API server that knows Ingresses."""

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
    """What a controller makes of Ingresses: nginx's configuration for their paths, to where each Service is."""
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
async def test_an_ingress_for_each_challenge(tmp_path: Path) -> None:
    """An Ingress is made for each name's token, leads the CA here as soon as the controller has seen it, and is gone afterwards."""
    cluster, nginx = Cluster(), Nginx(tmp_path / "nginx", "")
    async with (
        cluster.running(),
        connect(client.Configuration(host=cluster.url)) as api,
        site(tmp_path, http_port=nginx.port) as one,
    ):
        routes = IngressRoutes(api, "certmount", "certmount-authority", 8089, "nginx")
        settings = replace(one.settings, dns01=None, http01=Http01(self_test=nginx.address, ingress_class="nginx"))
        issuer = one.issuer(settings, routes=routes)
        server = ChallengeServer(f"{LOOPBACK}:0", lambda: (issuer,))
        port = await server.start()
        try:
            async with at_work(issuer):
                asking = asyncio.ensure_future(issuer.issue(order_for(*_NAMES)))
                await until(lambda: len(cluster.ingresses) == len(_NAMES), "an Ingress for each name")
                backends = {("certmount-authority", 8089): f"{LOOPBACK}:{port}"}
                async with replace(nginx, locations=locations(cluster.ingresses.values(), backends)).running():
                    assert dns_names((await asking).chain) == set(_NAMES)
        finally:
            await server.stop()
    assert cluster.ingresses == {}
    assert cluster.made == len(_NAMES)


async def test_what_is_there_or_gone_already() -> None:
    """Making an Ingress that is there, and removing one that is not, is done; what the API server refuses otherwise is told."""
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
