"""The fake API server and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from csi_driver.kube.connection import Api, ApiConfiguration
from tests.unit.kube.api_server import FakeApiServer


@pytest.fixture
async def server() -> AsyncIterator[FakeApiServer]:
    server = FakeApiServer()
    async with server.running():
        yield server


@pytest.fixture
async def api(server: FakeApiServer) -> AsyncIterator[Api]:
    async with Api(ApiConfiguration(url=server.url)) as api:
        yield api
