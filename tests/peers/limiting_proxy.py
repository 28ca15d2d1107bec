"""A proxy for Pebble that can reject new orders because of a rate limit or overload."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from tests.peers.pebble import Pebble
from tests.peers.processes import LOOPBACK
from tests.support.ports import free_port
from tests.support.stream_servers import web_server


@dataclass
class LimitingProxy:
    """Returns ``status`` (429 or 503) to new orders while it is set, with ``retry_after``."""

    ca: Pebble
    status: int = 0
    retry_after: str = "7200"
    detail: str = "too many certificates already issued for this exact set of identifiers"
    orders: int = 0  # The number of new orders
    port: int = field(default_factory=free_port)

    @property
    def directory(self) -> str:
        return f"https://localhost:{self.port}/dir"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca.ca_file, self.ca.ca_file.replace("tls.crt", "tls.key"))
        async with web_server(self._handle, context, self.port):
            yield

    async def _handle(self, request: web.Request) -> web.Response:
        if request.path == "/order-plz":
            self.orders += 1
            if self.status:
                return await self._reject(request)
        return await self._forward(request.method, request, await request.read())

    async def _reject(self, request: web.Request) -> web.Response:
        # RFC 8555 section 6.5: errors also contain a nonce.
        nonce = (await self._forward("HEAD", request, b"", "/nonce-plz")).headers["Replay-Nonce"]
        kind = "rateLimited" if self.status == 429 else "serverInternal"
        problem = {"type": f"urn:ietf:params:acme:error:{kind}", "detail": self.detail}
        headers = {"Retry-After": self.retry_after, "Replay-Nonce": nonce}
        text = json.dumps(problem)
        return web.Response(status=self.status, text=text, content_type="application/problem+json", headers=headers)

    async def _forward(self, method: str, request: web.Request, body: bytes, path: str | None = None) -> web.Response:
        # Keep the Host header, because Pebble builds its URLs from it.
        names = ("Host", "Content-Type", "User-Agent")
        headers = {name: request.headers[name] for name in names if name in request.headers}
        url = f"https://{LOOPBACK}:{self.ca.port}{path or request.path}"
        async with (
            aiohttp.ClientSession(trust_env=False) as session,
            session.request(method, url, data=body or None, headers=headers, ssl=False) as answer,
        ):
            kept = ("Content-Type", "Location", "Link", "Replay-Nonce", "Retry-After")
            passed = [(name, value) for name, value in answer.headers.items() if name in kept]
            response = web.Response(status=answer.status, body=await answer.read())
            for name, value in passed:
                response.headers.add(name, value) if name == "Link" else response.headers.update({name: value})
            return response
