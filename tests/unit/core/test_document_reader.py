"""Faults of configuration files: which ones are explained, and what many of them cost."""

from __future__ import annotations

import time

import pytest

from csi_driver.core.config.document_reader import DocumentReader
from csi_driver.core.errors import CertmountError, Reason


def test_100000_unknown_keys_take_limited_time() -> None:
    """Only the first faults are shown. A hint for each of them would take ten seconds, in which the program is slow."""
    document = {f"domains{number}": None for number in range(100_000)}
    reader = DocumentReader(Reason.INVALID_SOURCE, "list", {})
    started = time.process_time()
    reader.mapping((), document, allowed=("secret", "domains", "issuer", "duration"))
    with pytest.raises(CertmountError, match=r"domains0: is unknown; did you mean domains\?.*and 99950 more faults"):
        reader.finish()
    assert time.process_time() - started < 2
