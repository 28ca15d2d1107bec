"""Measures the memory of the driver's libraries without the driver: ``python -m tests.bench.floor ADDRESS ROOT_FILE SOCKET``.

Serves gRPC on SOCKET, makes one call over TLS to ADDRESS, and prints its resident memory in MB.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

sys.modules["rich"] = None  # type: ignore[assignment]  # like the driver in tests.bench.world

import click  # noqa: E402
import cryptography.x509  # noqa: E402
import google.protobuf.descriptor_pool  # noqa: E402
import grpc  # noqa: E402
import prometheus_client  # noqa: E402
import structlog  # noqa: E402

from tests.support.machine import rss_mb  # noqa: E402

LIBRARIES = (click, cryptography.x509, google.protobuf.descriptor_pool, prometheus_client, structlog)


async def serve(address: str, root: bytes, socket: str) -> None:
    server = grpc.aio.server()
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root)) as channel:
        with suppress(grpc.aio.AioRpcError):  # the method does not exist; only the connection matters
            await channel.unary_unary("/none", bytes, bytes)(b"")
        print(rss_mb(os.getpid()), flush=True)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]).read_bytes(), sys.argv[3]))
