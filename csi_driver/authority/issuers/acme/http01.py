"""Solves HTTP-01 challenges (RFC 8555 section 8.3): the CA fetches a file from port 80 of the name."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from aiohttp import web

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.acme.config import Http01
from csi_driver.authority.issuers.acme.http01_self_test import response_problem
from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.order_rules import wildcard_faults
from csi_driver.authority.issuers.acme.state import ChallengeRecord
from csi_driver.authority.issuers.dependencies import ChallengeRoutes
from csi_driver.core.addresses import parse_listen_address
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.telemetry.listening import listening_socket

HTTP01_PATH = "/.well-known/acme-challenge/"
MAX_STORE_AGE_S = 0.1  # A replica that does not find a token reads the store again if its copy is older
MAX_CONNECTIONS = 500  # Of the port for CAs
LOOKUP_THREADS = 4
"""DNS lookups of one order at the same time. Each blocks a thread until the name servers of its name respond."""
_MAX_CONNECTION_S = 10.0
_INTERVAL_S = 1.0
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)  # RFC 8555 section 8.3: base64url


class Http01Solver:
    """Creates the routes to the authority and tests them. The responses are in the store, so every replica can serve them."""

    kind = "http-01"

    def __init__(self, configuration: Http01, routes: ChallengeRoutes | None = None) -> None:
        self._configuration = configuration
        self._routes = routes

    def using(self, tsig_secret: str) -> Http01Solver:  # noqa: ARG002  # requests with a TSIG key are refused
        return self

    async def check(self, names: Sequence[str]) -> None:
        if faults := wildcard_faults(names):
            raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)

    async def prepare(self, name: str, token: str, key_authorization: str) -> ChallengeRecord:
        return ChallengeRecord(self.kind, name, token, key_authorization)

    async def publish(self, challenges: Sequence[ChallengeRecord]) -> None:
        """Wait until each name returns the right response; raise CertmountError with all names that don't."""
        for challenge in challenges:
            if self._routes is not None:
                await self._routes.open(challenge.name, challenge.token)
        started = time.monotonic()
        deadline = started + self._configuration.patience.total_seconds()
        # Threads of this order only: name servers that do not respond delay neither other orders nor the authority.
        lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="http01-lookups")
        try:
            found = await asyncio.gather(*(self._wait(challenge, deadline, lookups) for challenge in challenges))
        finally:
            lookups.shutdown(wait=False, cancel_futures=True)
        if faults := [fault for fault in found if fault is not None]:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, *faults)
        # The CA may reach another replica than the self-test did, with an older copy of the store.
        await asyncio.sleep(started + 2 * MAX_STORE_AGE_S - time.monotonic())

    async def unpublish(self, challenge: ChallengeRecord) -> None:
        if self._routes is not None:
            await self._routes.close(challenge.name, challenge.token)

    async def _wait(self, challenge: ChallengeRecord, deadline: float, lookups: Executor) -> Fault | None:
        while problem := await self._problem(challenge, lookups):
            if time.monotonic() >= deadline:
                hint = "route this path of port 80 to the authority's --acme-http; the CA validates after that"
                return Fault(f"http://{challenge.name}{HTTP01_PATH}", problem, hint)
            await asyncio.sleep(_INTERVAL_S)
        return None

    async def _problem(self, challenge: ChallengeRecord, lookups: Executor) -> str:
        server = None
        if self._configuration.self_test is not None:
            server = await asyncio.to_thread(Nameserver.parse, self._configuration.self_test, "http01.self_test", 80)
        path = HTTP01_PATH + challenge.token
        return await response_problem(challenge.name, path, challenge.value, server, lookups)


class ChallengeServer:
    """One port for all issuers. It is open to the internet, so it reads no bodies, serves one path, and limits connections.

    A connection ends after 10 seconds, and earlier if there are 500 newer ones: a response takes milliseconds.
    """

    def __init__(self, address: str, issuers: Callable[[], Iterable[Issuer]]) -> None:
        self._address = parse_listen_address(address)
        self._issuers = issuers
        application = web.Application(client_max_size=0)
        application.router.add_get(HTTP01_PATH + "{token}", self._respond)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, keepalive_timeout=5)
        self._connections: deque[web.RequestHandler] = deque()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen, and return the port; raises OSError."""
        await self._runner.setup()
        listener = await asyncio.to_thread(listening_socket, self._address)
        self._server = await asyncio.get_running_loop().create_server(self._connect, sock=listener)
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    def _connect(self) -> web.RequestHandler:
        if self._runner.server is None:
            raise AssertionError("setup() comes first")
        handler = self._runner.server()
        self._connections.append(handler)
        if len(self._connections) > MAX_CONNECTIONS:
            self._connections.popleft().force_close()
        asyncio.get_running_loop().call_later(_MAX_CONNECTION_S, self._expire, handler)
        return handler

    def _expire(self, handler: web.RequestHandler) -> None:
        handler.force_close()
        if handler in self._connections:
            self._connections.remove(handler)

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
