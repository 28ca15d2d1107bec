"""The demo's private directory, and the two certmount programs as child processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from csi_driver import NODE_AUDIENCE
from csi_driver.cli.demo.cluster import ISSUER, NODE, DemoKubelet, DemoPod, DemoTokenIssuer
from csi_driver.cli.demo.connections import LOOPBACK
from csi_driver.cli.demo.output import DemoError
from csi_driver.core.addresses import Address
from csi_driver.core.identity import ServiceAccount
from csi_driver.telemetry.listening import listening_socket

MEMORY = Path("/dev/shm")  # noqa: S108  # tempfile creates a directory in it that only its owner can read
ALLOWED = "{service_account}.{namespace}.svc.{cluster_domain}"
_POLICY = f"""\
policy:
- match: {{namespaces: ["*"], serviceAccounts: ["*"]}}
  allow: {{dns: ["{ALLOWED}"]}}
"""
_READY_TIMEOUT_S = 30.0
_READY_INTERVAL_S = 0.05
_GRACE_PERIOD_S = 5.0
_TAIL_LINES = 8


def private_directory(memory: Path = MEMORY) -> tempfile.TemporaryDirectory[str]:
    """Create a directory (0700) in memory, or in the temporary directory if ``memory`` is not writable."""
    usable = memory.is_dir() and os.access(memory, os.W_OK | os.X_OK)
    return tempfile.TemporaryDirectory(prefix="certmount-demo-", dir=memory if usable else None)


@dataclass(frozen=True, slots=True)
class Program:
    """A certmount command with its options. It serves /readyz on ``http_port`` of the loopback interface."""

    name: str
    directory: Path
    http_port: int
    options: Sequence[str]

    async def run(self) -> None:
        """Run the program until this task is cancelled. Raises DemoError if the program ends early or fails to stop."""
        # Its own process group: Ctrl-C reaches the demo only, which then stops its programs in order.
        command = (sys.executable, "-m", "csi_driver.cli.main", self.name, f"--http={LOOPBACK}:{self.http_port}")
        with self._log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(*command, *self.options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
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
        log, name = self._log, f"certmount {self.name}"
        lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if log.exists() else []
        return "\n   ".join([f"Last lines of the log of {name}:" if lines else f"{name} logged nothing.", *lines])

    @property
    def _log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def _readiness(self) -> str:
        connection = HTTPConnection(LOOPBACK, self.http_port, timeout=1)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().read().decode(errors="replace").strip()
        except (OSError, HTTPException) as error:
            return str(error)
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class DemoSetup:
    """The simulated kubelet, and the two programs. The authority listens on ``address``."""

    kubelet: DemoKubelet
    authority: Program
    node: Program
    address: str


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[DemoSetup]:
    """Start both programs, and stop them at the end. Adds their last log lines to a failure."""
    setup = _prepare(directory)
    try:
        async with asyncio.TaskGroup() as tasks, aclosing(setup.kubelet):
            programs = [tasks.create_task(one.run(), name=one.name) for one in (setup.node, setup.authority)]
            yield setup
            for program in programs:
                program.cancel()
    except BaseExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, DemoError) and not cause.logs:
            raise DemoError(str(cause), setup.authority.log_tail(), setup.node.log_tail()) from None
        raise cause from None


def _prepare(directory: Path) -> DemoSetup:
    """Write the files that the programs read into the empty ``directory``, which only its owner can enter."""
    tokens = DemoTokenIssuer()
    kubelet = DemoKubelet(directory / "kubelet", tokens)
    port, authority_http, node_http = _free_ports(3)
    policy, key_set, node_token, ca = (directory / name for name in ("policy.yaml", "jwks.json", "node-token", "ca"))
    driver = DemoPod(ServiceAccount("certmount", "certmount-node"), "certmount-node-demo")
    policy.write_text(_POLICY)
    key_set.write_text(tokens.key_set())
    node_token.write_text(tokens.issue(driver, NODE_AUDIENCE).reveal())
    authority = [
        f"--listen={LOOPBACK}:{port}",
        f"--serving-name={LOOPBACK}",
        f"--policy={policy}",
        f"--ca-dir={ca}",
        f"--jwks={key_set}",
        f"--token-issuer={ISSUER}",
    ]
    node = [
        f"--kubelet-dir={kubelet.root}",
        f"--node-name={NODE}",
        f"--authority={LOOPBACK}:{port}",
        f"--authority-root={ca / 'authority.crt'}",
        f"--token={node_token}",
        "--mounts=directory",
    ]
    programs = Program("authority", directory, authority_http, authority), Program("node", directory, node_http, node)
    return DemoSetup(kubelet, *programs, f"{LOOPBACK}:{port}")


def _free_ports(count: int) -> list[int]:
    """Return different loopback ports that are free at present."""
    with ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(listening_socket(Address(LOOPBACK, 0))) for _ in range(count)]
        return [open_socket.getsockname()[1] for open_socket in sockets]


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Terminate the process, and kill it after a grace period or when this task is cancelled."""
    try:
        _send(process, signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE_PERIOD_S)
    finally:
        _send(process, signal.SIGKILL)
    await process.wait()


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    # Before Python 3.13 Process.send_signal polls first; that can reap the process before asyncio reads its status.
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
