"""The clients of all issuers limit responses and follow no redirects; requests wait for a slot of their owners' share."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from josepy.jwk import JWKEC

from csi_driver.authority.issuers.acme.client import AcmeHttpClient, AcmeProblem, open_client
from csi_driver.authority.issuers.fair_slots import FairSlots
from csi_driver.authority.issuers.http_client import HttpClient, HttpError, JsonResponse
from csi_driver.authority.issuers.step_ca.client import StepCAClient
from csi_driver.core.errors import CertmountError, Reason
from tests.support.longest_step import LongestStep
from tests.support.waiting import in_background
from tests.unit.authority.issuers.hostile_server import ATTACKS, Attack, HostileServer, respond

Servers = tuple[HostileServer, HostileServer]
MEBIBYTE = 1024 * 1024
KEY = JWKEC(key=ec.generate_private_key(ec.SECP256R1()))
NOT_ACME = "HTTP 200 with a response that is not ACME"


@pytest.fixture
async def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Servers]:
    monkeypatch.setattr(HttpClient, "timeout_s", 2.0)
    monkeypatch.setattr(AcmeHttpClient, "timeout_s", 2.0)
    (tmp_path / "good").mkdir()
    async with HostileServer(tmp_path).running() as hostile, HostileServer(tmp_path / "good").running() as good:
        yield hostile, good


async def fetch_acme_directory(server: HostileServer) -> None:
    async with open_client(f"{server.url}/directory", KEY, str(server.ca_file)):
        pass


async def fetch_step_ca_health(server: HostileServer) -> None:
    async with contextlib.aclosing(StepCAClient(server.url, (server.root,))) as client:
        await client.health()


@pytest.mark.parametrize("fetch", [fetch_acme_directory, fetch_step_ca_health])
@pytest.mark.parametrize("attack, problem", ATTACKS.values(), ids=ATTACKS)
async def test_hostile_response_is_a_worded_error_in_time_and_delays_no_other_issuer(
    attack: Attack,
    problem: str,
    fetch: Callable[[HostileServer], Awaitable[None]],
    servers: Servers,
) -> None:
    hostile, good = servers
    hostile.attack = attack
    longest = LongestStep()
    tracemalloc.start()
    try:
        async with asyncio.timeout(20), in_background(longest.run()):
            attacked = asyncio.ensure_future(_failure(fetch, hostile))
            while not attacked.done():
                await fetch_step_ca_health(good)
            text = await attacked
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    is_json = fetch is fetch_acme_directory and ("JSON" in problem or "values" in problem or " more than" in problem)
    assert (NOT_ACME if is_json else problem) in text
    assert longest.seconds < 0.05
    assert peak < 20 * MEBIBYTE


async def _failure(fetch: Callable[[HostileServer], Awaitable[None]], server: HostileServer) -> str:
    with pytest.raises((HttpError, CertmountError, AcmeProblem)) as caught:
        await fetch(server)
    return str(caught.value)


async def test_headers_that_are_not_utf8_are_omitted(servers: Servers) -> None:
    """Such a text in the state of an ACME issuer would make the whole state unreadable for all replicas."""
    hostile = servers[0]
    headers = ("Location: https://localhost/?", "Replay-Nonce: ?", "Link: <?>", "Retry-After: 5")
    hostile.attack = lambda: [respond(b"{}", "409 Conflict", *headers).replace(b"?", b"\xff")]
    async with contextlib.aclosing(StepCAClient(hostile.url, (hostile.root,))) as client:
        response = await client.exchange("GET", "/")
    assert set(response.headers) == {"Content-Length", "Retry-After"}
    assert response.retry_after_s == 5
    with pytest.raises(AcmeProblem) as caught:
        await fetch_acme_directory(hostile)
    assert caught.value.text == "already exists: "


@pytest.mark.parametrize(
    "url", ["http://localhost/directory", "file:///etc/passwd", "https://localhost/" + "a" * 2048, "https://[", ""]
)
async def test_ca_can_lead_the_client_only_to_short_https_urls(url: str, servers: Servers) -> None:
    with pytest.raises(AcmeProblem, match="is not https, or longer than 2048 characters"):
        async with open_client(url, KEY, str(servers[1].ca_file)):
            pass


SHOP, BANK = ("namespace shop", "service account shop/web"), ("namespace bank", "service account bank/app")


async def test_owner_that_fills_its_share_delays_only_itself() -> None:
    slots, running, most = FairSlots("requests", 6, 60), 0, 0
    release = asyncio.Event()

    async def call() -> None:
        nonlocal running, most
        async with slots.hold(SHOP):
            running += 1
            most = max(most, running)
            await release.wait()
            running -= 1

    flood = [asyncio.ensure_future(call()) for _ in range(50)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5), slots.hold(BANK):
        assert running == 2
    release.set()
    await asyncio.gather(*flood)
    assert most <= 3


async def test_request_that_gets_no_slot_in_time_is_refused() -> None:
    slots = FairSlots("requests to issuer step at the same time", 3, 0.05)
    async with slots.hold(SHOP):
        with pytest.raises(CertmountError) as failure:
            async with slots.hold(SHOP):
                pass
    assert failure.value.reason is Reason.SHARE_EXCEEDED
    problem = "holds 1 of 3 requests to issuer step at the same time and requests 1 more, which exceeds its share"
    assert str(failure.value) == f"ShareExceeded: namespace shop: {problem}; wait until some of them end"
    async with slots.hold(SHOP):
        pass


async def test_failed_and_cancelled_requests_release_their_slots() -> None:
    slots = FairSlots("requests", 3, 0.05)
    for error in (ValueError, asyncio.CancelledError):
        with pytest.raises(error):
            async with slots.hold(SHOP):
                raise error
    async with slots.hold(SHOP):
        pass


@pytest.mark.parametrize(
    "message, shown",
    [
        ('the fingerprint "XSOTmfEX8XPp0H2meyJBK_j55CExcppcIc0".', True),
        ("bad token eyJhbGciOiJFUzI1NiJ9.eyJhdWQiOiJ4In0.c2ln", False),
        ("bad token xeyJhbGciOiJFUzI1NiJ9.eyJhdWQiOiJ4In0.c2ln", False),
        ('{"protected":"eyJhbGciOiJFUzI1NiJ9"}', False),
        ("two\nlines", False),
    ],
)
def test_message_is_shown_unless_it_may_contain_a_token(message: str, shown: bool) -> None:
    response = JsonResponse(403, {"message": message}, None)
    assert response.message == (message if shown else "")
