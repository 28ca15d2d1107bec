"""The OpenSSL program of tests. Versions before 3.5 do not support ML-DSA."""

from __future__ import annotations

import os
import subprocess

import pytest

from csi_driver.core.spec import KeyType
from tests.support.requirements import require_program

PROGRAM_VARIABLE = "CERTMOUNT_OPENSSL"


def openssl_for(*kinds: KeyType) -> str:
    """Return the program in CERTMOUNT_OPENSSL or on PATH. Skip the test if it does not support these keys.

    Skip it even if CERTMOUNT_REQUIRE_PEERS is set: many distributions still have OpenSSL 3.0.
    """
    program = os.environ.get(PROGRAM_VARIABLE) or require_program("openssl")
    if any(kind.value.startswith("ML-DSA") for kind in kinds) and not _supports_ml_dsa(program):
        pytest.skip(f"needs OpenSSL 3.5 or newer for ML-DSA, on PATH or in {PROGRAM_VARIABLE}")
    return program


def _supports_ml_dsa(program: str) -> bool:
    listed = subprocess.run([program, "list", "-signature-algorithms"], capture_output=True, check=True)
    return b"ML-DSA-65" in listed.stdout
