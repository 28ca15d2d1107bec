"""Runs servers on free loopback ports during a test."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from tests.support.waiting import until

LOOPBACK = "127.0.0.1"
_START_TIMEOUT_S = 30.0
_LOG_BYTES = 3000


def listening(port: int, host: str = LOOPBACK) -> bool:
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex((host, port)) == 0


@contextlib.asynccontextmanager
async def running(
    arguments: Sequence[str],
    log: Path,
    port: int,
    environment: Mapping[str, str] | None = None,
    *,
    host: str = LOOPBACK,
) -> AsyncIterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: ASYNC220  # it runs as long as the test
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **(environment or {})}
        )
    try:

        def ready() -> bool:
            assert process.poll() is None, f"{arguments[0]} ended: {log.read_bytes()[-_LOG_BYTES:].decode()}"
            return listening(port, host)

        await until(ready, f"{arguments[0]} on port {port}", _START_TIMEOUT_S)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
