"""TCP and HTTP servers with the behavior of a test, whose connections end with the test."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def stream_server(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """Serve connections on a free port until the block ends; ``serve`` may fail because the client closed its connection."""
    writers: list[asyncio.StreamWriter] = []
    ended: asyncio.Queue[None] = asyncio.Queue()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(OSError, EOFError):
            await serve(reader, writer)
            await writer.drain()
        writer.close()
        ended.put_nowait(None)

    server = await asyncio.start_server(serve_one, host, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        for _ in writers:
            await ended.get()


@contextlib.asynccontextmanager
async def web_server(
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]], tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[int]:
    """Handle HTTP requests for all paths until the block ends."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls, reuse_address=True).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
