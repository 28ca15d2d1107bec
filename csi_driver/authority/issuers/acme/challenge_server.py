"""Responds to the HTTP-01 requests of CAs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from aiohttp import web

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.acme.http01 import HTTP01_PATH
from csi_driver.core.errors import CertmountError

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)  # RFC 8555 section 8.3: base64url


class ChallengeServer:
    """One port for all issuers. It is open to the internet, so it reads no bodies and serves one path."""

    def __init__(self, address: str, issuers: Callable[[], Iterable[Issuer]]) -> None:
        host, _, port = address.rpartition(":")
        self._host = host.strip("[]") or None
        self._port = int(port)
        self._issuers = issuers
        application = web.Application(client_max_size=0)
        application.router.add_get(HTTP01_PATH + "{token}", self._respond)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, keepalive_timeout=5)

    async def start(self) -> int:
        """Listen and return the port; raise OSError."""
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _respond(self, request: web.Request) -> web.Response:
        token = request.match_info["token"]
        if _TOKEN.fullmatch(token) is None:
            return web.Response(status=404)
        try:
            for issuer in self._issuers():
                text = await issuer.http01_response(token)
                if text is not None:
                    return web.Response(text=text, content_type="application/octet-stream")
        except CertmountError:
            return web.Response(status=503)
        return web.Response(status=404)
