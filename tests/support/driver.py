"""Runs certmount's programs as processes, ``certmount node`` with a kubelet directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from tests.support.kubelet import Kubelet
from tests.support.ports import free_port
from tests.support.requirements import may_mount

_START_S = 30.0
_END_S = 30.0


def start(*arguments: str, log: Path, within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start ``certmount`` with a log of its output; ``within`` is a command that runs it."""
    with log.open("ab") as out:
        command = [*within, sys.executable, "-m", "csi_driver.cli.main", *arguments]
        return subprocess.Popen(command, stdout=out, stderr=out)


@contextlib.contextmanager
def started(*arguments: str, log: Path, within: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    with start(*arguments, log=log, within=within) as process:
        try:
            yield process
        finally:
            process.kill()


def http_get(url: str) -> tuple[int, str]:
    """Return the status and body; status 0 if nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


class Driver:
    """A driver process for a kubelet directory. ``log`` contains the output of all its starts."""

    def __init__(
        self,
        kubelet: Kubelet,
        authority: str,
        root_file: Path,
        token_file: Path,
        log: Path,
        *,
        within: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        """``within`` is a command that runs the driver, for example ``unshare --mount``."""
        self._kubelet = kubelet
        self._log = log
        self._within = within
        self.http = f"127.0.0.1:{free_port()}"
        self.options = options
        self._arguments = [
            f"--kubelet-dir={kubelet.root}",
            "--node-name=node1",
            f"--authority={authority}",
            f"--authority-root={root_file}",
            f"--token={token_file}",
            f"--http={self.http}",
            "--log-level=debug",
            f"--mounts={'kernel' if may_mount() else 'directory'}",
        ]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            command = [
                *self._within,
                sys.executable,
                "-m",
                "csi_driver.cli.main",
                "node",
                *self._arguments,
                *self.options,
            ]
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.returncode is not None:
                raise AssertionError(f"the driver ended with {self._process.returncode}:\n{self._log.read_text()}")
            async with self._kubelet.channel() as channel:
                try:
                    await asyncio.wait_for(channel.channel_ready(), 0.5)
                except (TimeoutError, grpc.aio.AioRpcError):
                    continue
                return
        raise AssertionError(f"the driver does not serve:\n{self._log.read_text()}")

    async def stop(self) -> int:
        return await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.returncode is None:
            process.send_signal(number)
        try:
            return await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AssertionError(f"the driver did not end within {_END_S:.0f} s of {number.name}") from None

    def log_text(self) -> str:
        return self._log.read_text()

    def events(self, event: str) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in self.log_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == event]

    def get(self, path: str) -> tuple[int, str]:
        return http_get(f"http://{self.http}{path}")
