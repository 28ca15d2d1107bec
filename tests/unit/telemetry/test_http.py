"""The server for probes and metrics."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from csi_driver.core.addresses import Address
from csi_driver.telemetry.http import HealthServer


async def test_server_that_is_stopped_at_once_ends_without_an_error() -> None:
    """A program that cannot start stops it right away. pytest reports an exception in the thread."""

    async def alive() -> Sequence[str]:
        return ()

    for _ in range(50):
        server = HealthServer(Address("127.0.0.1", 0), CollectorRegistry(), tuple, alive)
        server.start()
        server.stop()
