"""A CA that sends valid ACME with hostile values: each is a worded error in bounded time, and only its order waits."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from csi_driver.authority.issuers.acme import order as order_module
from csi_driver.authority.issuers.acme.config import AccountStorage, AcmeConfiguration, Http01
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.acme.order_rules import MAX_DELAY_S
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.identity import SecretIdentity
from csi_driver.core.names import EmailAddress
from csi_driver.core.policy.engine import RequestedCertificate
from tests.peers.acme import failure_of, request_for, running_issuers
from tests.support.stream_servers import web_server
from tests.unit.authority.issuers.hostile_server import HostileServer

NAME = "shop.example.test"


class HostileCA:
    """Answers like a CA. ``bodies``, ``headers`` and ``status`` replace parts of the responses, by path."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._tls = directory, HostileServer(directory)
        self.bodies: dict[str, Any] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.status: dict[str, int] = {}
        self.url = ""
        self.calls = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[HostileCA]:
        async with web_server(self._respond, self._tls.context) as port:
            self.url = f"https://localhost:{port}"
            yield self

    async def failure(self) -> str:
        issuer = self.issuer()
        async with running_issuers(issuer):
            return str(await failure_of(issuer, request_for(NAME)))

    def issuer(self) -> AcmeIssuer:
        store, file = self.directory / "store", str(self._tls.ca_file)
        account, url = AccountStorage(directory=str(store)), f"{self.url}/dir"
        configuration = AcmeConfiguration(account, directory=url, ca_file=file, roots_file=file, http01=Http01())
        return AcmeIssuer("ca", configuration, DirectoryStore(store, "acme.json"), wait_s=2)

    def authorization(self, **changes: str) -> dict[str, Any]:
        challenge = {"type": "http-01", "url": f"{self.url}/challenge", "token": "a" * 43, "status": "pending"}
        identifier = {"type": "dns", "value": NAME}
        return {"status": "pending", "identifier": identifier, "challenges": [{**challenge, **changes}]}

    async def _respond(self, request: web.Request) -> web.Response:
        self.calls += 1
        path = request.path.strip("/")
        normal: dict[str, Any] = {
            "dir": {name: f"{self.url}/{name}" for name in ("newNonce", "newAccount", "newOrder")},
            "newOrder": {"status": "pending"},
            "order": {"status": "processing", "finalize": f"{self.url}/finalize"},
            "authz": self.authorization(),
        }
        headers = {"Replay-Nonce": "bm9uY2U", "Location": f"{self.url}/{'order' if path == 'newOrder' else 'account'}"}
        headers |= self.headers.get(path, {})
        body, status = self.bodies.get(path, normal.get(path, {})), self.status.get(path, 200)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(body=content, headers=headers, status=status)


@pytest.fixture
async def ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HostileCA]:
    monkeypatch.setattr(order_module, "_MAX_WAIT_S", 0.5)
    async with HostileCA(tmp_path).running() as running:
        yield running


CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
STILL = "the CA is still processing the order; the authority retries after "
NOT_HTTPS = "is not https, or longer than 2048 characters"


@pytest.mark.parametrize(
    "path, body, problem",
    [
        ("order", {"status": "processing"}, STILL),
        ("order", {"status": "pending", "authorizations": []}, STILL),
        ("order", {"status": "pending", "authorizations": ["x"] * 10_000}, "HTTP 200 with a response that is not ACME"),
        ("order", {"status": "pending", "authorizations": ["x"] * 500}, "has no list of at most 200 authorizations"),
        ("order", {"status": "pending", "authorizations": ["http://localhost/authz"]}, NOT_HTTPS),
        ("order", {"status": "ready", "finalize": "http://localhost/"}, NOT_HTTPS),
        ("order", {"status": "valid", "certificate": "file:///etc/passwd"}, NOT_HTTPS),
        ("order", {}, "the order of the CA has no valid status"),
        ("order", {"status": ["valid"]}, "HTTP 200 with a response that is not ACME"),
        ("order", {"status": "invalid", "error": {"type": "a" * 10_000}}, "a" * 400),
        ("order", [[[]]], "HTTP 200 with a response that is not ACME"),
        (
            "authz",
            {"status": "pending", "identifier": {"type": "dns", "value": "x.test"}},
            "authorization for 'x.test'",
        ),
        ("authz", {"status": "pending"}, "the CA requires an authorization for None, which the order does not contain"),
        ("cert", CERTIFICATE * 11, "the response is longer than a chain of 10 certificates and 131072 bytes"),
        ("cert", CERTIFICATE * 20_000, "the response is longer than 1048576 bytes"),
        ("cert", b"<html></html>", "the response is not a certificate chain"),
        ("dir", {"newNonce": "http://localhost/"}, NOT_HTTPS),
        ("dir", {"meta": {"profiles": 3}}, NOT_HTTPS),
    ],
    ids=[str(number) for number in range(18)],
)
async def test_hostile_value_is_a_worded_error(path: str, body: Any, problem: str, ca: HostileCA) -> None:
    if path == "authz":
        ca.bodies["order"] = {"status": "pending", "authorizations": [f"{ca.url}/authz"]}
    if path == "cert":
        ca.bodies["order"] = {"status": "valid", "certificate": f"{ca.url}/cert"}
    ca.bodies[path] = body
    started = time.monotonic()
    text = await ca.failure()
    assert problem in text
    assert len(text) < 1000
    assert time.monotonic() - started < 8
    assert ca.calls < 100


async def test_long_challenge_token_is_rejected(ca: HostileCA) -> None:
    ca.bodies["order"] = {"status": "pending", "authorizations": [f"{ca.url}/authz"]}
    ca.bodies["authz"] = ca.authorization(token="a" * 4000)
    assert "the token of a challenge is longer than 256 bytes" in await ca.failure()


@pytest.mark.parametrize(
    "path, status, problem",
    [
        ("order", 200, "the CA is still processing"),
        ("newOrder", 429, "HTTP 429 without a reason"),
        ("newOrder", 503, "HTTP 503 without a reason"),
    ],
)
async def test_endless_retry_after_delays_an_order_one_day(path: str, status: int, problem: str, ca: HostileCA) -> None:
    ca.headers[path], ca.status[path] = {"Retry-After": "9" * 400}, status
    now = time.time()
    assert problem in await ca.failure()
    state = await ca.issuer()._orders.read(0.0)
    until = [one.retry_at for one in state.orders] + [one.until for one in state.backoffs]
    assert until == [pytest.approx(now + MAX_DELAY_S, abs=10)]
    assert [one.holder for one in state.orders] == [""] * len(state.orders)


async def test_response_without_a_nonce_is_an_error(ca: HostileCA) -> None:
    for nonce in ("a" * 600, "not base64!", ""):
        ca.headers["newNonce"] = ca.headers["dir"] = {"Replay-Nonce": nonce}
        text = await ca.failure()
        assert "the response to a request for a nonce contains no valid one" in text


async def test_ca_that_rejects_every_nonce_is_given_up(ca: HostileCA) -> None:
    ca.bodies["newAccount"] = {"type": "urn:ietf:params:acme:error:badNonce", "detail": "again"}
    ca.status["newAccount"] = 400
    assert "rejected the account: again" in await ca.failure()


async def test_address_that_the_ca_rejects_is_named_and_delays_its_names(ca: HostileCA) -> None:
    """In place of the issuer's own address, which only an administrator can change, and which is retried sooner."""
    ca.bodies["newAccount"] = {"type": "urn:ietf:params:acme:error:invalidContact", "detail": "no such domain"}
    ca.status["newAccount"] = 400
    requested = RequestedCertificate(acme_email=EmailAddress.parse("a@nowhere.test"))
    request = replace(request_for(NAME), requested=requested, identity=SecretIdentity("shop", "tls"))
    issuer = ca.issuer()
    async with running_issuers(issuer):
        error = str(await failure_of(issuer, request))
    problem = f"the CA rejected the order: {ca.url}/dir rejected the account of a@nowhere.test: no such domain"
    assert error.startswith(f"IssuerUnavailable: {NAME}: {problem} (invalidContact); the authority retries after ")
