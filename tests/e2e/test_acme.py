"""HTTP-01 with Ingress objects on the real API server, with the authority's account and the Role of docs/acme.md."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.authority.issuers.acme.config import Http01
from csi_driver.authority.issuers.acme.http01 import ChallengeServer
from csi_driver.kube.connection import Api, ApiConfiguration, bearer, client_context
from csi_driver.kube.ingress import LABELS, IngressRoutes
from tests.e2e import cluster
from tests.peers.acme import acme_environment, dns_names, request_for, running_issuers
from tests.peers.nginx import Nginx
from tests.peers.processes import LOOPBACK
from tests.peers.test_acme_docs import documents
from tests.peers.test_acme_ingress import locations
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "nginx", "openssl")

NAMES = ("shop.example.test", "www.example.test")
SELECTION = ("-l", ",".join(f"{key}={value}" for key, value in LABELS.items()))


async def _api_server(directory: Path) -> ApiConfiguration:
    view = json.loads(await asyncio.to_thread(cluster.kubectl, "config", "view", "--raw", "--minify", "-o", "json"))
    server = view["clusters"][0]["cluster"]
    ca = directory / "api.crt"
    if "certificate-authority-data" in server:
        ca.write_bytes(base64.b64decode(server["certificate-authority-data"]))
    else:
        ca = Path(server["certificate-authority"])
    token = (
        await asyncio.to_thread(cluster.kubectl, "-n", cluster.CERTMOUNT, "create", "token", "certmount-authority")
    ).strip()
    return ApiConfiguration(url=server["server"], tls=client_context(str(ca)), authorization=bearer(token))


async def test_each_challenge_gets_an_ingress_that_is_deleted_afterwards(tmp_path: Path) -> None:
    wanted = ("certmount-acme", "certmount-acme-ingress")
    objects = [one for one in documents("acme.md") if one.get("metadata", {}).get("name") in wanted]
    await asyncio.to_thread(
        cluster.apply, *(one for one in objects if one["kind"] == "Service" or "ingress" in one["metadata"]["name"])
    )
    nginx = Nginx(tmp_path / "nginx", "")
    async with Api(await _api_server(tmp_path)) as api, acme_environment(tmp_path, http_port=nginx.port) as env:
        routes = IngressRoutes(api, cluster.CERTMOUNT, "certmount-acme", 80, "nginx")
        http01 = Http01(self_test=nginx.address, ingress_class="nginx")
        configuration = replace(env.configuration, dns01=None, http01=http01)
        issuer = env.issuer(configuration, routes=routes)
        server = ChallengeServer(f"{LOOPBACK}:0", lambda: (issuer,))
        port = await server.start()
        try:
            async with running_issuers(issuer):
                issuing = asyncio.ensure_future(issuer.issue(request_for(*NAMES)))
                await until(lambda: len(cluster.find("ingress", *SELECTION)) == len(NAMES), "an Ingress for each name")
                made = await asyncio.to_thread(cluster.find, "ingress", *SELECTION)
                nginx_locations = locations(made, {("certmount-acme", 80): f"{LOOPBACK}:{port}"})
                async with replace(nginx, locations=nginx_locations).running():
                    assert dns_names((await issuing).chain) == set(NAMES)
                assert await asyncio.to_thread(cluster.find, "ingress", *SELECTION) == []
        finally:
            await server.stop()
