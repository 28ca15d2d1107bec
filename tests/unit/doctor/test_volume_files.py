"""Files of volumes that take long to read."""

from __future__ import annotations

import time
from pathlib import Path

from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.spec import KeyType
from csi_driver.doctor.volume_files import read_volume


def test_file_with_many_starts_of_keys_is_read_soon(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\n" * 37_000)
    (tmp_path / "b.pem").write_bytes(
        b"-----BEGIN PRIVATE KEY-----\n" + encode_key(generate_key(KeyType.EC_P256)).reveal()
    )
    started = time.thread_time()
    _, (many, one) = read_volume(tmp_path, None)
    assert time.thread_time() - started < 1
    assert many.problem == "has no complete certificate or private key"
    assert one.kind == "private key"
