"""Proof by HTTP: a file that the CA fetches from port 80 of the name (RFC 8555 section 8.3)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.routes import NoRoutes, Routes
from csi_driver.authority.issuers.acme.settings import Http01
from csi_driver.authority.issuers.acme.state import Proof
from csi_driver.core.errors import CertmountError, Fault, Reason

KIND = "http-01"
PATH = "/.well-known/acme-challenge/"
STALE_S = 0.1
"""As old may a replica's copy of the store be that says it knows no such token."""
_STEP_S = 1.0
_MAX_BYTES = 1024
_TIMEOUT = aiohttp.ClientTimeout(total=5)


class HttpProofs:
    """The answers stand in the store, for any replica to give; here the way to them is made and tested."""

    kind = KIND

    def __init__(self, settings: Http01, routes: Routes | None = None) -> None:
        self._settings = settings
        self._routes = routes or NoRoutes()

    async def examine(self, names: Sequence[str]) -> None:
        """Raises CertmountError NameNotAllowed for wildcards, which only DNS can prove (RFC 8555 section 8.3)."""
        if faults := wildcard_faults(names):
            raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)

    async def prepare(self, name: str, token: str, key_authorization: str) -> Proof:
        """What the CA is to find."""
        return Proof(KIND, name, token, key_authorization)

    async def show(self, proofs: Sequence[Proof]) -> None:
        """Returns when each name answers as the CA wants it; raises CertmountError with all that don't."""
        for proof in proofs:
            await self._routes.open(proof.name, proof.token)
        begun = time.monotonic()
        deadline = begun + self._settings.patience.total_seconds()
        found = await asyncio.gather(*(self._awaited(proof, deadline) for proof in proofs))
        if faults := [fault for fault in found if fault is not None]:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, *faults)
        # The self-test has met one replica, the CA may meet another, whose copy of the store was older than the answer.
        await asyncio.sleep(begun + 2 * STALE_S - time.monotonic())

    async def hide(self, proof: Proof) -> None:
        """Ends the route; the answer goes with the proof in the store."""
        await self._routes.close(proof.name, proof.token)

    async def _awaited(self, proof: Proof, deadline: float) -> Fault | None:
        while problem := await self._missing(proof):
            if time.monotonic() >= deadline:
                hint = (
                    "the CA is not asked before it is right; lead that path of port 80 to the authority's --acme-http"
                )
                return Fault(f"http://{proof.name}{PATH}", problem, hint)
            await asyncio.sleep(_STEP_S)
        return None

    async def _missing(self, proof: Proof) -> str:
        """Why the CA would not find the answer; empty when it would."""
        resolver, port = await self._resolver(proof.name)
        try:
            # Redirects are followed to any certificate, as CAs do: what is at the end proves itself.
            connector = aiohttp.TCPConnector(resolver=resolver, ssl=False)
            async with (
                aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, trust_env=False) as session,
                session.get(f"http://{proof.name}:{port}{PATH}{proof.token}") as answer,
            ):
                body = await answer.content.read(_MAX_BYTES)
        except TimeoutError:
            return "does not answer in time"
        except (aiohttp.ClientError, OSError) as error:
            return f"cannot be reached ({error})"
        if answer.status != 200:
            return f"answers HTTP {answer.status}"
        return "" if body.decode("ascii", "replace").strip() == proof.value else "answers with something else"

    async def _resolver(self, name: str) -> tuple[AbstractResolver, int]:
        ordinary = aiohttp.ThreadedResolver()
        if self._settings.self_test is None:
            return ordinary, 80
        server = await asyncio.to_thread(Nameserver.parse, self._settings.self_test, "http01.self_test")
        return _Pinned(name, server.address, ordinary), server.port


class _Pinned(AbstractResolver):
    """Knows one name better than DNS does."""

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


def wildcard_faults(names: Sequence[str]) -> list[Fault]:
    hint = "the issuer needs dns01 for that"
    return [Fault(name, "a wildcard can't be proven by HTTP", hint) for name in names if name.startswith("*.")]
