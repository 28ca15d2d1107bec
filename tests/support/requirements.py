"""The requirements of tests: root, and programs.

A test whose requirement is missing is skipped with the reason. With ``CERTMOUNT_REQUIRE_PEERS=1`` (set in CI) it fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

from csi_driver.core.spec import KeyType

REQUIRE_VARIABLE = "CERTMOUNT_REQUIRE_PEERS"
OPENSSL_VARIABLE = "CERTMOUNT_OPENSSL"
_CAP_SYS_ADMIN = 21  # the bit of the capability to mount, capabilities(7)


def missing(reason: str) -> NoReturn:
    """Skip the test with the reason, or fail it if nothing may be missing."""
    if os.environ.get(REQUIRE_VARIABLE) == "1":
        pytest.fail(f"{reason} ({REQUIRE_VARIABLE}=1)", pytrace=False)
    pytest.skip(reason)


def require_root() -> None:
    """Skip the test unless the process is root and can mount."""
    if os.geteuid() != 0:
        missing("needs root")
    if not may_mount():
        missing("needs the capability to mount (CAP_SYS_ADMIN)")


def may_mount() -> bool:
    """Return True for root with the capability to mount. Otherwise tests use directories instead of mounts."""
    return os.geteuid() == 0 and bool(_effective_capabilities() >> _CAP_SYS_ADMIN & 1)


def require_program(name: str) -> str:
    """Return the path of a program on PATH or of ``make peers`` or ``go install``. Skip the test if it is missing."""
    directories = os.pathsep.join(map(str, (*_peer_directories(name), *_go_directories())))
    path = shutil.which(name) or shutil.which(name, path=directories)
    if path is None:
        missing(f"needs the program {name}")
    return path


def _peer_directories(name: str) -> list[Path]:
    """Return the directories of scripts/install-peers, the newest version first."""
    cache = Path(os.environ.get("CERTMOUNT_CACHE") or Path.home() / ".cache" / "certmount")
    return sorted(cache.glob(f"{name}-*"), reverse=True)


def _go_directories() -> list[Path]:
    """Return the directories of ``go install``: GOBIN, or bin in each directory of GOPATH."""
    if gobin := os.environ.get("GOBIN"):
        return [Path(gobin)]
    gopath = os.environ.get("GOPATH") or str(Path.home() / "go")
    return [Path(directory) / "bin" for directory in gopath.split(os.pathsep)]


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))


def openssl_for(*kinds: KeyType) -> str:
    """Return the program in CERTMOUNT_OPENSSL or on PATH. Skip the test if it does not support these keys.

    Skip it even if CERTMOUNT_REQUIRE_PEERS is set: many distributions still have OpenSSL 3.0.
    """
    program = os.environ.get(OPENSSL_VARIABLE) or require_program("openssl")
    if any(kind.value.startswith("ML-DSA") for kind in kinds) and not _supports_ml_dsa(program):
        pytest.skip(f"needs OpenSSL 3.5 or newer for ML-DSA, on PATH or in {OPENSSL_VARIABLE}")
    return program


def _supports_ml_dsa(program: str) -> bool:
    listed = subprocess.run([program, "list", "-signature-algorithms"], capture_output=True, check=True)
    return b"ML-DSA-65" in listed.stdout


def require_kubernetes(version: str) -> Path:
    """Return the directory of the binaries of a Kubernetes version that the end-to-end tests built. Skip the test without them."""
    directory = Path(os.environ.get("LOCALKUBE_CACHE") or Path.home() / ".cache" / "localkube") / version
    if not (directory / "kube-apiserver").is_file():
        missing(f"needs kube-apiserver {version} in {directory}; tests/e2e/localkube/install.sh builds it")
    return directory
