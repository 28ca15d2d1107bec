"""The one place where a test says what it needs of the machine.

Where that is missing the test is skipped with the reason, so that ``make test`` tells on any machine what it could not
show. With ``CERTMOUNT_REQUIRE_PEERS=1`` (set in CI) it fails instead: there a gap is a mistake.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

REQUIRE_VARIABLE = "CERTMOUNT_REQUIRE_PEERS"
_CAP_SYS_ADMIN = 21
"""The bit of CAP_SYS_ADMIN, which mounting needs (capabilities(7))."""


def missing(reason: str) -> NoReturn:
    """Ends the test that cannot run here: skipped with the reason, or failed where nothing may be missing."""
    if os.environ.get(REQUIRE_VARIABLE) == "1":
        pytest.fail(f"{reason} ({REQUIRE_VARIABLE}=1)", pytrace=False)
    pytest.skip(reason)


def require_root() -> None:
    """Ends the test unless the process is root and may mount."""
    if os.geteuid() != 0:
        missing("needs root")
    if not may_mount():
        missing("needs the capability to mount (CAP_SYS_ADMIN)")


def may_mount() -> bool:
    """True for root with the capability to mount; where it is false, folders stand in for mounts."""
    return os.geteuid() == 0 and bool(_effective_capabilities() >> _CAP_SYS_ADMIN & 1)


def require_program(name: str) -> str:
    """The path of a program: on PATH, where ``make peers`` or ``go install`` put it; ends the test where there is none."""
    folders = os.pathsep.join(map(str, (*_peer_folders(name), *_go_folders())))
    path = shutil.which(name) or shutil.which(name, path=folders)
    if path is None:
        missing(f"needs the program {name}")
    return path


def _peer_folders(name: str) -> list[Path]:
    """Where scripts/install-peers puts a program, the newest version first."""
    cache = Path(os.environ.get("CERTMOUNT_CACHE") or Path.home() / ".cache" / "certmount")
    return sorted(cache.glob(f"{name}-*"), reverse=True)


def _go_folders() -> list[Path]:
    """Where ``go install`` puts programs: GOBIN, or bin in each folder of GOPATH (``go help install``)."""
    if gobin := os.environ.get("GOBIN"):
        return [Path(gobin)]
    gopath = os.environ.get("GOPATH") or str(Path.home() / "go")
    return [Path(folder) / "bin" for folder in gopath.split(os.pathsep)]


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
