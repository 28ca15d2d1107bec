"""Describes the machine of the measurements."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("grpcio", "cryptography", "protobuf", "prometheus-client", "structlog")


def describe() -> str:
    """Return processors, memory, kernel, Python, important packages and the load."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return (
        f"{os.cpu_count()} x {_field('/proc/cpuinfo', 'model name')}, {_memory_gb():.0f} GB, Linux {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}; {packages}; load before the run {load()}"
    )


def load() -> str:
    """Return the load averages over 1, 5 and 15 minutes: getloadavg(3)."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _field(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), platform.machine())


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
