"""HTTP-01 with Pebble and nginx, which routes the challenge path to the authority."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from csi_driver.authority.issuers.acme.config import Http01
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.core.errors import CertmountError, Reason
from tests.peers.acme import (
    AcmeEnvironment,
    acme_environment,
    challenge_server,
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

    def issuer(self, *, patience_s: float = 120, **options: Any) -> AcmeIssuer:
        # As behind a load balancer, the self-test connects to a fixed address.
        http01 = Http01(self_test=self.nginx.address, patience=timedelta(seconds=patience_s))
        return self.environment.issuer(replace(self.environment.configuration, dns01=None, http01=http01), **options)


@contextlib.asynccontextmanager
async def edge(directory: Path, locations: str = ROUTE) -> AsyncIterator[Edge]:
    authority_port = free_port()
    nginx = Nginx(directory / "nginx", locations.format(address=f"{LOOPBACK}:{authority_port}"))
    async with acme_environment(directory, http_port=nginx.port) as env, nginx.running():
        yield Edge(env, nginx, authority_port)


async def test_names_are_tested_before_the_ca_validates_and_tokens_are_removed_afterwards(tmp_path: Path) -> None:
    async with edge(tmp_path) as env:
        issuer = env.issuer()
        async with running_issuers(issuer), challenge_server(issuer, port=env.authority_port):
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


_TO_AUTHORITY = "rewrite ^/moved(.*) /.well-known/acme-challenge$1 break; proxy_pass http://{address};"
_REDIRECTED = f"location /.well-known/acme-challenge/ {{{{ rewrite ^/.well-known/acme-challenge(.*) /moved$1 redirect; }}}} location /moved/ {{{{ {_TO_AUTHORITY} }}}}"


async def test_any_replica_can_respond_to_the_ca_also_after_a_redirect(tmp_path: Path) -> None:
    async with edge(tmp_path, locations="absolute_redirect off; " + _REDIRECTED) as env:
        processing, responding = env.issuer(), env.issuer()
        async with running_issuers(processing), challenge_server(responding, port=env.authority_port):
            assert dns_names((await processing.issue(request_for(NAME))).chain) == {NAME}


@pytest.mark.parametrize(
    "location, problem",
    [
        ("return 302 http://shop.example.test:8080$request_uri;", "redirects to http://shop.example.test:8080/.well-known/acme-"),
        ("return 301 http://127.0.0.1$request_uri;", "CAs do not follow redirects to IP addresses"),
        ("return 302 http://$host/a$request_uri;", "redirects more than 10 times; CAs follow at most 10 redirects"),
        ("return 303 /moved;", "returned HTTP 303; CAs do not follow this redirect"),
        ("return 200 ' text';", "returned other content"),
        ("return 404;", "returned HTTP 404"),
    ],
    ids=["port", "address", "eleven redirects", "status", "content", "no route"],
)  # fmt: skip
async def test_what_the_ca_refuses_is_explained_before_validation(tmp_path: Path, location: str, problem: str) -> None:
    async with edge(tmp_path, locations=f"location ~ .*/.well-known/acme-challenge/ {{{{ {location} }}}}") as env:
        issuer = env.issuer(patience_s=1, wait_s=4)
        async with running_issuers(issuer), challenge_server(issuer, port=env.authority_port):
            error = await failure_of(issuer, request_for(NAME))
        assert error.reason is Reason.ISSUANCE_PENDING
        assert f"http://{NAME}/.well-known/acme-challenge/: " in str(error)
        assert problem in str(error)
        assert "--acme-http" in str(error)
        assert env.environment.ca.validations == 0


async def test_order_waits_until_the_proxy_reaches_the_authority(tmp_path: Path) -> None:
    async with edge(tmp_path) as env:
        issuer = env.issuer()
        request = request_for(NAME)
        async with running_issuers(issuer):
            issuing = asyncio.ensure_future(issue_when_ready(issuer, request))
            await until(lambda: env.nginx.requests, "the self-test to begin")
            assert " 502 " in env.nginx.requests[0]
            async with challenge_server(issuer, port=env.authority_port):
                assert dns_names((await issuing).chain) == {NAME}
        assert len(env.environment.ca.orders) == 1


async def test_wildcard_is_rejected_before_any_order(tmp_path: Path) -> None:
    async with edge(tmp_path) as env:
        issuer = env.issuer()
        with pytest.raises(CertmountError, match="HTTP-01 does not support wildcards") as failure:
            await issuer.issue(request_for("*.example.test"))
        assert failure.value.reason is Reason.NAME_NOT_ALLOWED


async def test_public_port_serves_nothing_but_known_tokens(tmp_path: Path) -> None:
    challenge = "/.well-known/acme-challenge/"
    unknown = [f"{challenge}{name}" for name in ("", "nosuch", "..%2f..%2fetc", "a" * 5000)]
    async with edge(tmp_path) as env, challenge_server(env.issuer()) as port, aiohttp.ClientSession() as session:
        base = f"http://{LOOPBACK}:{port}"
        for path in ("/", "/metrics", *unknown):
            async with session.get(base + path) as answer:
                assert answer.status == 404, path
        async with session.post(f"{base}{challenge}nosuch", data=b"x" * 100_000) as answer:
            assert answer.status == 405
