"""What the kernel knows of a process: memory and time on a processor."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path


def rss_mb(pid: int) -> float:
    """Resident memory in MB (10^6 bytes): VmRSS of proc_pid_status(5)."""
    return _kb(Path(f"/proc/{pid}/status"), "VmRSS:") * 1024 / 1e6


def pss_mb(pid: int) -> float:
    """Memory in MB with each shared page divided by its users: Pss of proc_pid_smaps(5)."""
    return _kb(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024 / 1e6


def cpu_s(pid: int) -> float:
    """Seconds that the threads of a process have run so far; in nanoseconds, where the tick of proc_pid_stat(5) is 10 ms."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread may end meanwhile
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


async def settle(pid: int) -> None:
    """Waits until the process has nothing to do any more: less than 2 ms of processor time in 0.2 s."""
    before = cpu_s(pid)
    while True:
        await asyncio.sleep(0.2)  # the time is part of the condition
        now = cpu_s(pid)
        if now - before < 0.002:
            return
        before = now


def _kb(path: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field))
