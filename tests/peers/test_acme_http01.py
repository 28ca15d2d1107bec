"""HTTP-01 with Pebble and nginx, which routes the challenge path to the authority."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.acme.config import AcmeConfiguration, Http01
from csi_driver.authority.issuers.acme.http01 import ChallengeServer
from csi_driver.core.errors import CertmountError, Reason
from tests.peers.acme import (
    AcmeEnvironment,
    acme_environment,
    dns_names,
    failure_of,
    issue_when_ready,
    request_for,
    running_issuers,
)
from tests.peers.nginx import ROUTE, Nginx
from tests.peers.processes import LOOPBACK
from tests.support.ports import free_port
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "nginx", "openssl")

NAME = "shop.example.test"


@dataclass(frozen=True)
class Edge:
    """A CA that fetches responses from nginx, and nginx with a route to the authority's port."""

    environment: AcmeEnvironment
    nginx: Nginx
    authority_port: int

    @property
    def configuration(self) -> AcmeConfiguration:
        # As behind a load balancer, the self-test connects to a fixed address.
        return replace(self.environment.configuration, dns01=None, http01=Http01(self_test=self.nginx.address))


@contextlib.asynccontextmanager
async def edge(directory: Path, locations: str = ROUTE) -> AsyncIterator[Edge]:
    authority_port = free_port()
    nginx = Nginx(directory / "nginx", locations.format(address=f"{LOOPBACK}:{authority_port}"))
    async with acme_environment(directory, http_port=nginx.port) as env, nginx.running():
        yield Edge(env, nginx, authority_port)


@contextlib.asynccontextmanager
async def challenge_server(port: int, *issuers: Issuer) -> AsyncIterator[None]:
    server = ChallengeServer(f"{LOOPBACK}:{port}", lambda: issuers)
    await server.start()
    try:
        yield
    finally:
        await server.stop()


async def test_names_are_tested_before_the_ca_validates_and_tokens_are_removed_afterwards(tmp_path: Path) -> None:
    async with edge(tmp_path) as env:
        issuer = env.environment.issuer(env.configuration)
        async with running_issuers(issuer), challenge_server(env.authority_port, issuer):
            issued = await issuer.issue(request_for(NAME, "www.example.test"))
            assert dns_names(issued.chain) == {NAME, "www.example.test"}
            lines = env.nginx.requests
            assert lines
            assert all("GET /.well-known/acme-challenge/" in line and " 200 " in line for line in lines)
            own = [index for index, line in enumerate(lines) if "LetsEncrypt-Pebble-VA" not in line]
            first_of_ca = next(index for index, line in enumerate(lines) if "LetsEncrypt-Pebble-VA" in line)
            assert len(own) == 2
            assert max(own) < first_of_ca
            path = lines[0].split('"')[1].split()[1]
            async with aiohttp.ClientSession() as session, session.get(f"http://{env.nginx.address}{path}") as answer:
                assert answer.status == 404


async def test_any_replica_can_respond_to_the_ca(tmp_path: Path) -> None:
    async with edge(tmp_path) as env:
        processing, responding = env.environment.issuer(env.configuration), env.environment.issuer(env.configuration)
        async with running_issuers(processing), challenge_server(env.authority_port, responding):
            assert dns_names((await processing.issue(request_for(NAME))).chain) == {NAME}


async def test_missing_route_is_explained_and_the_ca_never_validates(tmp_path: Path) -> None:
    async with edge(tmp_path, locations="") as env:
        http01 = Http01(self_test=env.nginx.address, patience=timedelta(seconds=1))
        impatient = replace(env.configuration, http01=http01)
        issuer = env.environment.issuer(impatient, wait_s=4)
        async with running_issuers(issuer), challenge_server(env.authority_port, issuer):
            error = await failure_of(issuer, request_for(NAME))
            assert error.reason is Reason.ISSUANCE_PENDING
            assert f"http://{NAME}/.well-known/acme-challenge/: returned other content" in str(error)
            assert "--acme-http" in str(error)
        assert env.environment.ca.validations == 0


async def test_order_waits_until_the_proxy_reaches_the_authority(tmp_path: Path) -> None:
    async with edge(tmp_path) as env:
        issuer = env.environment.issuer(env.configuration)
        request = request_for(NAME)
        async with running_issuers(issuer):
            issuing = asyncio.ensure_future(issue_when_ready(issuer, request))
            await until(lambda: env.nginx.requests, "the self-test to begin")
            assert " 502 " in env.nginx.requests[0]
            async with challenge_server(env.authority_port, issuer):
                assert dns_names((await issuing).chain) == {NAME}
        assert len(env.environment.ca.orders) == 1


async def test_wildcard_is_rejected_before_any_order(tmp_path: Path) -> None:
    async with edge(tmp_path) as env:
        issuer = env.environment.issuer(env.configuration)
        with pytest.raises(CertmountError, match="HTTP-01 does not support wildcards") as failure:
            await issuer.issue(request_for("*.example.test"))
        assert failure.value.reason is Reason.NAME_NOT_ALLOWED


async def test_public_port_serves_nothing_but_known_tokens(tmp_path: Path) -> None:
    async with edge(tmp_path) as env:
        issuer = env.environment.issuer(env.configuration)
        async with challenge_server(env.authority_port, issuer), aiohttp.ClientSession() as session:
            base = f"http://{LOOPBACK}:{env.authority_port}"
            challenge = "/.well-known/acme-challenge/"
            for path in (
                "/",
                "/metrics",
                challenge,
                f"{challenge}nosuch",
                f"{challenge}..%2f..%2fetc",
                f"{challenge}{'a' * 5000}",
            ):
                async with session.get(base + path) as answer:
                    assert answer.status == 404, path
            async with session.post(f"{base}{challenge}nosuch", data=b"x" * 100_000) as answer:
                assert answer.status == 405
