"""Solves HTTP-01 challenges (RFC 8555 section 8.3): the CA fetches a file from port 80 of the name."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.acme.config import Http01
from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.order_rules import wildcard_faults
from csi_driver.authority.issuers.acme.state import ChallengeRecord
from csi_driver.authority.issuers.dependencies import ChallengeRoutes
from csi_driver.core.errors import CertmountError, Fault, Reason

HTTP01_PATH = "/.well-known/acme-challenge/"
MAX_STORE_AGE_S = 0.1  # A replica that does not find a token reads the store again if its copy is older
_INTERVAL_S = 1.0
_MAX_BYTES = 1024
_TIMEOUT = aiohttp.ClientTimeout(total=5)
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)  # RFC 8555 section 8.3: base64url


class Http01Solver:
    """Creates the routes to the authority and tests them. The responses are in the store, so every replica can serve them."""

    kind = "http-01"

    def __init__(self, configuration: Http01, routes: ChallengeRoutes | None = None) -> None:
        self._configuration = configuration
        self._routes = routes

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
        found = await asyncio.gather(*(self._wait(challenge, deadline) for challenge in challenges))
        if faults := [fault for fault in found if fault is not None]:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, *faults)
        # The CA may reach another replica than the self-test did, with an older copy of the store.
        await asyncio.sleep(started + 2 * MAX_STORE_AGE_S - time.monotonic())

    async def unpublish(self, challenge: ChallengeRecord) -> None:
        if self._routes is not None:
            await self._routes.close(challenge.name, challenge.token)

    async def _wait(self, challenge: ChallengeRecord, deadline: float) -> Fault | None:
        while problem := await self._problem(challenge):
            if time.monotonic() >= deadline:
                hint = "route this path of port 80 to the authority's --acme-http; the CA validates after that"
                return Fault(f"http://{challenge.name}{HTTP01_PATH}", problem, hint)
            await asyncio.sleep(_INTERVAL_S)
        return None

    async def _problem(self, challenge: ChallengeRecord) -> str:
        resolver, port = await self._resolver(challenge.name)
        url = f"http://{challenge.name}:{port}{HTTP01_PATH}{challenge.token}"
        try:
            # Follow redirects and accept any certificate, as CAs do: the content of the response proves itself.
            connector = aiohttp.TCPConnector(resolver=resolver, ssl=False)
            async with (
                aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, trust_env=False) as session,
                session.get(url) as response,
            ):
                body = await response.content.read(_MAX_BYTES)
        except TimeoutError:
            return "does not respond in time"
        except (aiohttp.ClientError, OSError) as error:
            return f"cannot be reached ({error})"
        if response.status != 200:
            return f"returned HTTP {response.status}"
        return "" if body.decode("ascii", "replace").strip() == challenge.value else "returned other content"

    async def _resolver(self, name: str) -> tuple[AbstractResolver, int]:
        default = aiohttp.ThreadedResolver()
        if self._configuration.self_test is None:
            return default, 80
        server = await asyncio.to_thread(Nameserver.parse, self._configuration.self_test, "http01.self_test")
        return _FixedAddressResolver(name, server.address, default), server.port


class _FixedAddressResolver(AbstractResolver):
    """Resolves one name to a fixed address."""

    def __init__(self, name: str, address: str, others: AbstractResolver) -> None:
        self._name = name
        self._address = address
        self._others = others

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if host != self._name:
            return await self._others.resolve(host, port, family)
        own = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        return [ResolveResult(hostname=host, host=self._address, port=port, family=own, proto=0, flags=0)]

    async def close(self) -> None:
        await self._others.close()


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
