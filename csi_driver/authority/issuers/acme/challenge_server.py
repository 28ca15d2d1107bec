"""Answers the CAs' HTTP-01 requests: any replica for any token, as tokens lie in the issuers' stores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from aiohttp import web

from csi_driver.authority.issuers.acme.http01 import PATH
from csi_driver.authority.issuers.external import Http01Responder
from csi_driver.core.errors import CertmountError

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
"""RFC 8555 section 8.3: base64url."""


class ChallengeServer:
    """One port for all issuers. It is open to the world: it reads no bodies and knows one path."""

    def __init__(self, address: str, issuers: Callable[[], Iterable[Http01Responder]]) -> None:
        host, _, port = address.rpartition(":")
        self._host = host.strip("[]") or None
        self._port = int(port)
        self._issuers = issuers
        application = web.Application(client_max_size=0)
        application.router.add_get(PATH + "{token}", self._answer)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, keepalive_timeout=5)

    async def start(self) -> int:
        """Listens; the port, of use where 0 was asked for. Raises OSError."""
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Closes the port."""
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        token = request.match_info["token"]
        if _TOKEN.fullmatch(token) is None:
            return web.Response(status=404)
        try:
            for issuer in self._issuers():
                answer = await issuer.http_answer(token)
                if answer is not None:
                    return web.Response(text=answer, content_type="application/octet-stream")
        except CertmountError:
            return web.Response(status=503)
        return web.Response(status=404)
