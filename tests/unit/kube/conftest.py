"""The fake API server and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from kubernetes.aio import client

from csi_driver.kube.client import connect
from tests.unit.kube.api_server import FakeApiServer


@pytest.fixture
async def server() -> AsyncIterator[FakeApiServer]:
    server = FakeApiServer()
    async with server.running():
        yield server


@pytest.fixture
async def api(server: FakeApiServer) -> AsyncIterator[client.ApiClient]:
    async with connect(client.Configuration(host=server.url)) as api:
        yield api
