"""Names proven by HTTP: pebble fetches the answer through nginx, which leads that one path to the authority."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest

from csi_driver.authority.issuers.acme.challenge_server import ChallengeServer
from csi_driver.authority.issuers.acme.settings import AcmeSettings, Http01
from csi_driver.authority.issuers.external import Http01Responder
from csi_driver.core.errors import CertmountError, Reason
from tests.peers.acme import Site, at_work, dns_names, order_for, patiently, site, told
from tests.peers.nginx import ROUTE, Nginx
from tests.peers.processes import LOOPBACK, free_port
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "nginx", "openssl")

NAME = "shop.example.test"


@dataclass(frozen=True)
class Edge:
    """A CA that fetches answers from nginx's port, and nginx, which has the authority's port to lead to."""

    site: Site
    nginx: Nginx
    authority_port: int

    @property
    def settings(self) -> AcmeSettings:
        # DNS is the test's own: the self-test finds the edge server by its address, as behind a load balancer.
        return replace(self.site.settings, dns01=None, http01=Http01(self_test=self.nginx.address))


@contextlib.asynccontextmanager
async def edge(folder: Path, locations: str = ROUTE) -> AsyncIterator[Edge]:
    authority_port = free_port()
    nginx = Nginx(folder / "nginx", locations.format(address=f"{LOOPBACK}:{authority_port}"))
    async with site(folder, http_port=nginx.port) as one, nginx.running():
        yield Edge(one, nginx, authority_port)


@contextlib.asynccontextmanager
async def answering(port: int, *issuers: Http01Responder) -> AsyncIterator[None]:
    server = ChallengeServer(f"{LOOPBACK}:{port}", lambda: issuers)
    await server.start()
    try:
        yield
    finally:
        await server.stop()


async def test_through_a_reverse_proxy(tmp_path: Path) -> None:
    """Two names are proven through nginx; each is tested before the CA is asked, and afterwards no token is answered any more."""
    async with edge(tmp_path) as one:
        issuer = one.site.issuer(one.settings)
        async with at_work(issuer), answering(one.authority_port, issuer):
            issued = await issuer.issue(order_for(NAME, "www.example.test"))
            assert dns_names(issued.chain) == {NAME, "www.example.test"}
            lines = one.nginx.asked
            assert lines
            assert all("GET /.well-known/acme-challenge/" in line and " 200 " in line for line in lines)
            own = [index for index, line in enumerate(lines) if "LetsEncrypt-Pebble-VA" not in line]
            first_of_ca = next(index for index, line in enumerate(lines) if "LetsEncrypt-Pebble-VA" in line)
            assert len(own) == 2
            assert max(own) < first_of_ca
            path = lines[0].split('"')[1].split()[1]
            async with aiohttp.ClientSession() as session, session.get(f"http://{one.nginx.address}{path}") as answer:
                assert answer.status == 404


async def test_any_replica_answers(tmp_path: Path) -> None:
    """A replica that knows nothing of an order but its store answers the CA for the one that works on it."""
    async with edge(tmp_path) as one:
        working, answering_one = one.site.issuer(one.settings), one.site.issuer(one.settings)
        async with at_work(working), answering(one.authority_port, answering_one):
            assert dns_names((await working.issue(order_for(NAME))).chain) == {NAME}


async def test_a_route_that_leads_elsewhere(tmp_path: Path) -> None:
    """Without the route the CA is never asked to look; the pod is told which address answers wrongly, and what to do."""
    async with edge(tmp_path, locations="") as one:
        hasty = replace(one.settings, http01=Http01(self_test=one.nginx.address, patience=timedelta(seconds=1)))
        issuer = one.site.issuer(hasty, patience_s=4)
        async with at_work(issuer), answering(one.authority_port, issuer):
            refusal = await told(issuer, order_for(NAME))
            assert refusal.reason is Reason.ISSUANCE_PENDING
            assert f"http://{NAME}/.well-known/acme-challenge/: answers with something else" in str(refusal)
            assert "--acme-http" in str(refusal)
        assert one.site.ca.validations == 0


async def test_a_proxy_that_comes_late(tmp_path: Path) -> None:
    """An authority's port that nginx can't reach at first is waited for; the same order goes on."""
    async with edge(tmp_path) as one:
        issuer = one.site.issuer(one.settings)
        order = order_for(NAME)
        async with at_work(issuer):
            asking = asyncio.ensure_future(patiently(issuer, order))
            await until(lambda: one.nginx.asked, "the self-test to begin")
            assert " 502 " in one.nginx.asked[0]
            async with answering(one.authority_port, issuer):
                assert dns_names((await asking).chain) == {NAME}
        assert len(one.site.ca.orders) == 1


async def test_a_wildcard_is_refused(tmp_path: Path) -> None:
    """A wildcard can't be proven by HTTP: refused with the reason, before any order."""
    async with edge(tmp_path) as one:
        issuer = one.site.issuer(one.settings)
        with pytest.raises(CertmountError, match="wildcard can't be proven by HTTP") as refusal:
            await issuer.issue(order_for("*.example.test"))
        assert refusal.value.reason is Reason.NAME_NOT_ALLOWED


async def test_the_port_tells_nothing_else(tmp_path: Path) -> None:
    """The port that the world can reach answers tokens that are open, and for anything else 404 or 405."""
    async with edge(tmp_path) as one:
        issuer = one.site.issuer(one.settings)
        async with answering(one.authority_port, issuer), aiohttp.ClientSession() as session:
            base = f"http://{LOOPBACK}:{one.authority_port}"
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
