"""Memory and CPU time of a process."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path


def rss_mb(pid: int) -> float:
    """Return the resident memory in MB (10^6 bytes): VmRSS of proc_pid_status(5)."""
    return _kb(Path(f"/proc/{pid}/status"), "VmRSS:") * 1024 / 1e6


def pss_mb(pid: int) -> float:
    """Return the memory in MB, with each shared page divided by its number of users: Pss of proc_pid_smaps(5)."""
    return _kb(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024 / 1e6


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of all threads so far, from schedstat: proc_pid_stat(5) has a resolution of 10 ms only."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


async def wait_until_idle(pid: int) -> None:
    """Wait until the process is idle: less than 2 ms of CPU time in 0.2 s."""
    before = cpu_s(pid)
    while True:
        await asyncio.sleep(0.2)  # the interval is part of the condition
        now = cpu_s(pid)
        if now - before < 0.002:
            return
        before = now


def _kb(path: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field))
