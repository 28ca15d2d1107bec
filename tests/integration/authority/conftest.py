"""A running authority and a client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.authority.world import Caller, Cluster, World
from tests.support.tokens import TokenIssuer


@pytest.fixture(scope="session")
def issuer() -> TokenIssuer:
    return TokenIssuer()


@pytest.fixture
def calls() -> str:
    """How callers send issuance requests. Modules that test requests repeat their tests with streams."""
    return "unary"


@pytest.fixture
async def idle_world(tmp_path: Path, issuer: TokenIssuer, calls: str) -> World:
    return World(tmp_path, issuer, Cluster(issuer), calls=calls)


@pytest.fixture
async def world(idle_world: World) -> AsyncIterator[World]:
    async with idle_world.running():
        yield idle_world


@pytest.fixture
async def caller(world: World) -> AsyncIterator[Caller]:
    async with world.channel() as channel:
        yield Caller(world, channel)
