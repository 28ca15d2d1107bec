"""The machine of the measurements, and the memory and CPU time of its processes."""

from __future__ import annotations

import asyncio
import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("grpcio", "cryptography", "protobuf", "prometheus-client", "structlog")


def describe() -> str:
    """Return processors, memory, kernel, Python, important packages and the load."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{os.cpu_count()} x {_field('/proc/cpuinfo', 'model name')}, {memory_gb:.0f} GB, Linux {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}; {packages}; load before the run {load()}"
    )


def load() -> str:
    """Return the load averages over 1, 5 and 15 minutes: getloadavg(3)."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def load_per_processor() -> float:
    """Return by how much other processes can slow one down: the load average for each processor, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def rss_mb(pid: int) -> float:
    """Return the resident memory in MB (10^6 bytes): VmRSS of proc_pid_status(5)."""
    return _kb(Path(f"/proc/{pid}/status"), "VmRSS:") * 1024 / 1e6


def peak_mb(pid: int) -> float:
    """Return the largest resident memory so far in MB: VmHWM."""
    return _kb(Path(f"/proc/{pid}/status"), "VmHWM:") * 1024 / 1e6


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


def _field(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), platform.machine())


def _kb(path: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field))
