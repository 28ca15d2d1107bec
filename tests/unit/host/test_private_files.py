"""What the driver stores for itself always belongs to the generation that pods see."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret
from csi_driver.host.directories import open_descriptor
from csi_driver.host.generations import (
    MAX_READ_BYTES,
    PRIVATE,
    erase_files,
    read_generation,
    read_private,
    write_generation,
)
from tests.unit.host.samples import pair
from tests.unit.host.test_generations import Killed, faulty, full_once, full_then_broken, killed, stays_full


@pytest.fixture
def files_dir(tmp_path: Path) -> Path:
    for name in ("files", PRIVATE):
        (tmp_path / name).mkdir()
    return tmp_path / "files"


def write(files_dir: Path, number: int, stamp: str) -> None:
    write_generation(files_dir, pair(number), stamp, Secret(f"{number} ".encode()))


def assert_matches(files_dir: Path, *numbers: int) -> int:
    """The driver's copy has the number of the files; return it."""
    shown = read_generation(files_dir)["site.key"]
    assert read_private(files_dir).reveal() == shown
    assert shown in [f"{number} ".encode() for number in numbers]
    return int(shown)


def test_only_the_copy_of_the_current_generation_stays(files_dir: Path) -> None:
    for number in range(3):
        write(files_dir, number, "1")  # the clock stands still
        assert_matches(files_dir, number)
        (stored,) = (files_dir.parent / PRIVATE).iterdir()
        assert stored.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("fail", [full_once, stays_full, full_then_broken, killed])
def test_copy_matches_the_files_after_a_failure_at_any_call(files_dir: Path, fail: Callable[[int], None]) -> None:
    at, untouched, seen = 0, False, set()
    while not untouched:
        at += 1
        write(files_dir, 1, "old")
        with faulty(at, fail) as replaced:
            try:
                write(files_dir, 2, "new")
            except (CertmountError, Killed):
                pass
            else:
                untouched = replaced.calls < at
        seen.add(assert_matches(files_dir, 1, 2))
        write(files_dir, 3, "repaired")
        assert_matches(files_dir, 3)
        assert len(list((files_dir.parent / PRIVATE).iterdir())) == 1
    assert seen == {1, 2}


def test_concurrent_readers_always_find_a_copy(files_dir: Path) -> None:
    write(files_dir, 0, "0")
    done, failures, reads = threading.Event(), list[BaseException](), list[bytes]()

    def read() -> None:
        try:
            while not done.is_set():
                reads.append(read_private(files_dir).reveal())
        except CertmountError as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, 300):
        write(files_dir, number, str(number))
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(set(reads)) > 1


def test_missing_copy_raises_volume_not_found(files_dir: Path) -> None:
    with pytest.raises(CertmountError, match=r"^VolumeNotFound: "):
        read_private(files_dir)
    with pytest.raises(CertmountError, match=r"^VolumeNotFound: "):
        read_private(files_dir / "nowhere")
    write_generation(files_dir, pair(1), "1")
    with pytest.raises(CertmountError, match=r"^VolumeNotFound: "):
        read_private(files_dir)


def test_reading_is_limited(files_dir: Path) -> None:
    write(files_dir, 1, "1")
    (stored,) = (files_dir.parent / PRIVATE).iterdir()
    stored.write_bytes(b"x" * (MAX_READ_BYTES * 2))
    assert len(read_private(files_dir).reveal()) == MAX_READ_BYTES + 1


def test_erased_directory_is_empty(files_dir: Path) -> None:
    write(files_dir, 1, "1")
    for directory in (files_dir, files_dir.parent / PRIVATE):
        with open_descriptor(directory, os.O_RDONLY) as opened:
            erase_files(opened)
        assert list(directory.iterdir()) == []
