"""The demo's private directory, and the two certmount programs as child processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from csi_driver.cli.demo.errors import DemoError

MEMORY = Path("/dev/shm")  # noqa: S108  # tempfile creates a directory in it that only its owner can read
_READY_TIMEOUT_S = 30.0
_READY_INTERVAL_S = 0.05
_GRACE_PERIOD_S = 5.0
_TAIL_LINES = 8


def private_directory(memory: Path = MEMORY) -> tempfile.TemporaryDirectory[str]:
    """Create a directory (0700) in memory, or in the temporary directory if ``memory`` is not writable."""
    usable = memory.is_dir() and os.access(memory, os.W_OK | os.X_OK)
    return tempfile.TemporaryDirectory(prefix="certmount-demo-", dir=memory if usable else None)


class Program:
    """A certmount command with its options. It serves /readyz on ``http_port`` of 127.0.0.1."""

    def __init__(self, name: str, options: Sequence[str], directory: Path, http_port: int) -> None:
        self.name = name
        self._options = options
        self._directory = directory
        self._http_port = http_port
        self._log = directory / f"{name}.log"
        self._log.touch()

    async def run(self) -> None:
        """Run the program until this task is cancelled. Raises DemoError if the program ends early or fails to stop."""
        # Its own process group: Ctrl-C reaches the demo only, which then stops its programs in order.
        with self._log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "csi_driver.cli.main", self.name, *self._options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                process_group=0,
            )
        try:
            await process.wait()
        except asyncio.CancelledError:
            await _stop(process)
            # The signal itself ends a program that has not installed its handler yet.
            if process.returncode in (0, -signal.SIGTERM):
                raise
        status = process.returncode or 0
        how = f"exited with status {status}" if status >= 0 else f"was killed by signal {-status}"
        raise DemoError(f"certmount {self.name} {how}", self.log_tail())

    async def wait_until_ready(self) -> None:
        """Poll /readyz until it answers ok. Raises DemoError with the last answer after 30 seconds."""
        answer = "no answer"
        with suppress(TimeoutError):
            async with asyncio.timeout(_READY_TIMEOUT_S):
                while (answer := await asyncio.to_thread(self._readiness)) != "ok":  # noqa: ASYNC110  # another process has no event
                    await asyncio.sleep(_READY_INTERVAL_S)
                return
        raise DemoError(f"certmount {self.name} is not ready after {_READY_TIMEOUT_S:.0f} s: {answer}")

    def log_tail(self) -> str:
        """Return the last log lines with a heading."""
        lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        heading = (
            f"Last lines of the log of certmount {self.name}:" if lines else f"certmount {self.name} logged nothing."
        )
        return "\n   ".join([heading, *lines])

    def _readiness(self) -> str:
        connection = HTTPConnection("127.0.0.1", self._http_port, timeout=1)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().read().decode(errors="replace").strip()
        except (OSError, HTTPException) as error:
            return str(error)
        finally:
            connection.close()


def free_ports(count: int) -> list[int]:
    """Return different loopback ports that are free at present."""
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [open_socket.getsockname()[1] for open_socket in sockets]


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Terminate the process, and kill it after a grace period or when this task is cancelled."""
    try:
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE_PERIOD_S)
    finally:
        if process.returncode is None:
            process.kill()
    await process.wait()
