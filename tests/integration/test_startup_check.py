"""The startup probe succeeds when the authority has published its root, so that the kubelet updates the file with it."""

from __future__ import annotations

import asyncio

from csi_driver.rpc.startup_check import MAX_WAIT_S, StartupCheck
from tests.support.ports import free_port

MISSING = "the file does not exist"


async def test_probe_succeeds_after_the_authority_accepts_a_connection() -> None:
    port = free_port()
    check = StartupCheck(f"127.0.0.1:{port}", lambda: MISSING)
    refused = await check()
    assert refused[0] == MISSING
    assert refused[1].startswith(f"127.0.0.1:{port} does not accept connections: ")
    accepted = asyncio.Event()

    def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", port):
        assert await check() == [MISSING]  # the kubelet gets a moment to receive the ConfigMap
        await accepted.wait()
    assert await check() == []


async def test_probe_makes_no_connection_if_the_root_exists() -> None:
    assert await StartupCheck(f"127.0.0.1:{free_port()}", lambda: None)() == []


async def test_program_starts_without_an_authority_after_some_minutes() -> None:
    now = 0.0
    check = StartupCheck(f"127.0.0.1:{free_port()}", lambda: MISSING, lambda: now)
    assert await check()
    now = MAX_WAIT_S + 1
    assert await check() == []
