"""Which OpenSSL a test may ask: ML-DSA is in none before 3.5."""

from __future__ import annotations

import os
import subprocess

import pytest

from csi_driver.core.spec import KeyType
from tests.support.requirements import require_program

PROGRAM_VARIABLE = "CERTMOUNT_OPENSSL"


def openssl_for(*kinds: KeyType) -> str:
    """The program that knows these keys: the one of CERTMOUNT_OPENSSL, else that on PATH; ends the test where it doesn't.

    Skipped even where nothing may be missing: cryptography's own OpenSSL is newer, and the distributions of today have 3.0.
    """
    program = os.environ.get(PROGRAM_VARIABLE) or require_program("openssl")
    if any(kind.value.startswith("ML-DSA") for kind in kinds) and not _knows_ml_dsa(program):
        pytest.skip(f"needs OpenSSL 3.5 or newer for ML-DSA, on PATH or in {PROGRAM_VARIABLE}")
    return program


def _knows_ml_dsa(program: str) -> bool:
    listed = subprocess.run([program, "list", "-signature-algorithms"], capture_output=True, check=True)
    return b"ML-DSA-65" in listed.stdout
