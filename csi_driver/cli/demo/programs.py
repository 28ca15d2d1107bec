"""The folder that all of the demo happens in, and the two certmount programs as processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from csi_driver.cli.demo.failure import DemoFailed, Log

MEMORY = Path("/dev/shm")  # noqa: S108  # only the place; the folder in it is made by tempfile, for its owner alone
_READY_S = 30.0
_LOOK_AGAIN_S = 0.05
_GRACE_S = 5.0
_LAST_LINES = 8


def private_folder(memory: Path = MEMORY) -> tempfile.TemporaryDirectory[str]:
    """A new folder (0700), in memory where there is such a place, else where temporary files go; ends with its context."""
    usable = memory.is_dir() and os.access(memory, os.W_OK | os.X_OK)
    return tempfile.TemporaryDirectory(prefix="certmount-demo-", dir=memory if usable else None)


class Program:
    """A certmount command with its options; ``http`` is where it answers /readyz (host 127.0.0.1)."""

    def __init__(self, name: str, options: Sequence[str], folder: Path, http_port: int) -> None:
        self.name = name
        self._options = options
        self._folder = folder
        self._http_port = http_port
        self._log = folder / f"{name}.log"
        self._last_lines: Sequence[str] = ()

    async def run(self) -> None:
        """Starts it, and ends it when cancelled. Raises DemoFailed when it ends by itself, or otherwise than asked."""
        # A group of its own: Ctrl-C is for the demo, which then ends its programs in order.
        with self._log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "csi_driver.cli.main", self.name, *self._options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                process_group=0,
            )
        try:
            await process.wait()
        except asyncio.CancelledError:
            await _end(process)
            # Before Python has set up its own handler, the signal itself ends it.
            if process.returncode in (0, -signal.SIGTERM):
                raise
        finally:
            self._last_lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        status = process.returncode or 0
        how = f"status {status}" if status >= 0 else f"signal {-status}"
        raise DemoFailed(f"certmount {self.name} has ended with {how}", self.last_log())

    async def ready(self) -> None:
        """Waits until it says so; raises DemoFailed with what it says instead."""
        answer = "no answer"
        with suppress(TimeoutError):
            async with asyncio.timeout(_READY_S):
                while (answer := await self._readiness()) != "ok":  # noqa: ASYNC110  # it is another process's to know
                    await asyncio.sleep(_LOOK_AGAIN_S)
                return
        raise DemoFailed(f"certmount {self.name} is not ready after {_READY_S:.0f} s: {answer}")

    def last_log(self) -> Log:
        """The last lines of its log; complete once :meth:`run` has ended."""
        return Log(f"certmount {self.name}", self._last_lines)

    async def _readiness(self) -> str:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port)
        except OSError as error:
            return str(error)
        try:
            writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
            return (await reader.read()).decode(errors="replace").partition("\r\n\r\n")[2].strip()
        except OSError as error:
            return str(error)
        finally:
            writer.close()


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody listens on now."""
    with ExitStack() as open_sockets:
        probes = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


async def _end(process: asyncio.subprocess.Process) -> None:
    """Asks it to end, then insists; it has ended, or is about to, whatever happens here."""
    if process.returncode is not None:
        return
    try:
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE_S)
    finally:
        if process.returncode is None:
            process.kill()
    await process.wait()
