"""Who leads a CA's HTTP-01 requests to the authority."""

from __future__ import annotations

from typing import Protocol


class Routes(Protocol):
    """Leads the CA to the authority, where nobody has done so once and for all."""

    async def open(self, name: str, token: str) -> None:
        """Has requests for the token at the name come here; also where they do already."""

    async def close(self, name: str, token: str) -> None:
        """Ends that; also where it has ended."""


class NoRoutes:
    """The user's own route leads here."""

    async def open(self, name: str, token: str) -> None:
        """Nothing to do."""

    async def close(self, name: str, token: str) -> None:
        """Nothing to do."""
