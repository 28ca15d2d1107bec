"""The client limits size and time of responses, and follows no redirects."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from csi_driver.authority.issuers.acme import client as client_module
from csi_driver.authority.issuers.acme.client import AcmeClient, AcmeProblem
from csi_driver.authority.issuers.http_client import MAX_RESPONSE_BYTES
from csi_driver.core.errors import CertmountError
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from tests.unit.core import pki

ALWAYS = pki.Validity(-timedelta(days=3650), timedelta(days=36500))


async def redirect(_: web.Request) -> web.Response:
    return web.Response(status=302, headers={"Location": "/directory"})


async def directory(_: web.Request) -> web.Response:
    return web.json_response({"newNonce": "https://localhost/nonce"})


async def long(_: web.Request) -> web.Response:
    return web.Response(body=b" " * (MAX_RESPONSE_BYTES + 1))


async def slow(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            await response.write(b" ")
            await asyncio.sleep(0.05)
    return response


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[str, str]]:
    root, key = pki.authority("root", validity=ALWAYS), pki.key_of(KeyType.EC_P256)
    certificate = pki.leaf(root, key, Names.of([DNSName("localhost")]), validity=ALWAYS)
    (tmp_path / "root.pem").write_bytes(root.certificate.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    (tmp_path / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    application = web.Application()
    application.add_routes([web.get(f"/{handler.__name__}", handler) for handler in (redirect, directory, long, slow)])
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    yield f"https://localhost:{runner.addresses[0][1]}", str(tmp_path / "root.pem")
    await runner.cleanup()


@pytest.mark.parametrize(
    "path, error, text",
    [
        ("/redirect", AcmeProblem, "HTTP 302 with a response that is not ACME"),
        ("/long", CertmountError, f"more than {MAX_RESPONSE_BYTES} bytes"),
        ("/slow", CertmountError, "does not respond within"),
    ],
)
async def test_unbounded_or_redirected_response_is_an_error(
    path: str, error: type[Exception], text: str, server: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_TIMEOUT_S", 0.5)
    url, root = server
    client = AcmeClient(url + path, None, root)
    with pytest.raises(error, match=text):
        await asyncio.to_thread(client.fetch_directory)


async def test_directory_is_fetched_over_https_only(server: tuple[str, str]) -> None:
    url, root = server
    found = await asyncio.to_thread(AcmeClient(f"{url}/directory", None, root).fetch_directory)
    assert found["newNonce"] == "https://localhost/nonce"
    with pytest.raises(CertmountError, match="cannot be reached"):
        await asyncio.to_thread(AcmeClient("http://localhost:9/directory", None, root).fetch_directory)
