"""Programs of others as processes of a test: started on free ports of loopback, awaited, and stopped by who started them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from tests.support.waiting import until

LOOPBACK = "127.0.0.1"
_PATIENCE_S = 30.0
_SHOWN_BYTES = 3000


def free_port() -> int:
    """One that nobody listens on, neither with TCP nor with UDP."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind((LOOPBACK, 0))
            port = int(tcp.getsockname()[1])
            with contextlib.suppress(OSError):
                udp.bind((LOOPBACK, port))
                return port


def listening(port: int) -> bool:
    """True when someone takes connections there."""
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex((LOOPBACK, port)) == 0


@contextlib.asynccontextmanager
async def running(
    arguments: Sequence[str], log: Path, port: int, environment: Mapping[str, str] | None = None
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """The program, once it listens on ``port``; what it prints goes to ``log``."""
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: ASYNC220  # its life is the test's, not the loop's
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **(environment or {})}
        )
    try:

        def ready() -> bool:
            assert process.poll() is None, f"{arguments[0]} ended: {log.read_bytes()[-_SHOWN_BYTES:].decode()}"
            return listening(port)

        await until(ready, f"{arguments[0]} on port {port}", _PATIENCE_S)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
