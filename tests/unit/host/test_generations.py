"""The files of a volume change atomically."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.host import generations
from csi_driver.host.generations import MAX_READ_BYTES, VolumeFile, read_generation, replaced_at, write_generation
from tests.unit.host.samples import files, pair

CALLS = ("mkdir", "open", "fchown", "fchmod", "write", "symlink", "rename", "unlink", "rmdir", "readlink", "scandir")
OLD = {"a.crt": b"old", "b.crt": b"old"}
NEW = {"b.crt": b"new", "c.crt": b"new"}


def listing(directory: Path) -> dict[str, list[str]]:
    """Return the content of a files directory: the targets of links and the entries of directories."""
    return {
        path.name: [str(path.readlink())] if path.is_symlink() else sorted(child.name for child in path.iterdir())
        for path in directory.iterdir()
    }


def complete(stamp: str, *names: str) -> dict[str, list[str]]:
    """Return the listing of a directory with one generation and nothing else."""
    return {f"..{stamp}": sorted(names), "..data": [f"..{stamp}"]} | {name: [f"..data/{name}"] for name in names}


def settled(directory: Path) -> dict[str, list[str]]:
    """Return the listing without the previous generation, which readers may still use."""
    found = listing(directory)
    current = found["..data"][0]
    others = [name for name in found if name.startswith("..") and name not in ("..data", current)]
    assert len(others) <= 1, others
    return {name: entry for name, entry in found.items() if name not in others}


class FaultyOs:
    """The os module, but ``fail`` runs at call number ``at`` of ``names`` and at all later ones, or after them if ``late``."""

    def __init__(self, at: int, fail: Callable[[int], None], names: Sequence[str], *, late: bool) -> None:
        self.calls = 0
        self._at = at
        self._fail = fail
        self._names = names
        self._late = late

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._faulty(real) if name in self._names else real

    def _faulty(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            late, result = self._late, None
            if late:
                result = real(*arguments, **named)
            if self.calls >= self._at:
                self._fail(self.calls - self._at)
            return result if late else real(*arguments, **named)

        return call


class Killed(BaseException):
    """Simulates SIGKILL: no cleanup works after it."""


@contextmanager
def faulty(
    at: int, fail: Callable[[int], None], names: Sequence[str] = CALLS, *, late: bool = False
) -> Iterator[FaultyOs]:
    replaced = FaultyOs(at, fail, names, late=late)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generations, "os", replaced)
        yield replaced


def full_once(later: int) -> None:
    if later == 0:
        raise OSError(errno.ENOSPC, "full")


def stays_full(later: int) -> None:  # noqa: ARG001 - all later calls fail too
    raise OSError(errno.ENOSPC, "full")


def full_then_broken(later: int) -> None:
    raise OSError(errno.EIO if later else errno.ENOSPC, "broken")


def killed(later: int) -> None:  # noqa: ARG001 - all later calls fail too
    raise Killed


def named(contents: dict[str, bytes]) -> list[VolumeFile]:
    return [VolumeFile(name, Secret(content), 0o644, None) for name, content in contents.items()]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_layout_is_that_of_a_secret_volume(directory: Path) -> None:
    write_generation(directory, files(root_crt="r", site_crt="c"), "2026_11_22_10_00_00.123456")
    assert settled(directory) == complete("2026_11_22_10_00_00.123456", "root.crt", "site.crt")
    assert (directory / "site.crt").read_text() == "c"
    assert read_generation(directory) == {"root.crt": b"r", "site.crt": b"c"}


def test_new_generation_replaces_the_old_one(directory: Path) -> None:
    write_generation(directory, named(OLD), "1")
    write_generation(directory, named(NEW), "2")
    assert settled(directory) == complete("2", "b.crt", "c.crt")
    assert read_generation(directory) == NEW


def test_previous_generation_stays_until_the_next_write(directory: Path) -> None:
    """A reader that has resolved ``..data`` still reads a matching pair."""
    write_generation(directory, pair(1), "1")
    followed = (directory / "..data").resolve()
    write_generation(directory, pair(2), "2")
    assert (followed / "site.crt").read_bytes() == (followed / "site.key").read_bytes() == b"1 "
    write_generation(directory, pair(3), "3")
    assert not followed.exists()


def test_modes_do_not_depend_on_the_umask(directory: Path) -> None:
    before = os.umask(0o077)
    try:
        wanted = [VolumeFile("a", Secret(b""), 0o440, os.getgid()), VolumeFile("b", Secret(b""), 0o666, None)]
        write_generation(directory, wanted, "1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "a").stat().st_mode) == 0o440
    assert stat.S_IMODE((directory / "b").stat().st_mode) == 0o666
    assert stat.S_IMODE((directory / "..1").stat().st_mode) == 0o755
    assert (directory / "a").stat().st_gid == os.getgid()


NAMES = ["", ".", "..", "..data", "..x", "a/b", "/", "a\0", "x" * 256, "ü" * 128]


@pytest.mark.parametrize("name, mode", [*((name, 0o644) for name in NAMES), ("a", -1), ("a", 0o1000), ("a", 0o4755)])
def test_invalid_file_names_and_special_mode_bits_are_rejected(name: str, mode: int) -> None:
    problem = "is not a file mode" if name == "a" else "is not a valid name"
    with pytest.raises(ValueError, match=problem):
        VolumeFile(name, Secret(b""), mode, None)


@pytest.mark.parametrize("stamp", ["", "data", "data_tmp", "link_tmp", "../x", "a/b", ".a", "a\n", "x" * 101])
def test_invalid_generation_name_is_rejected(directory: Path, stamp: str) -> None:
    with pytest.raises(ValueError, match="is not a valid name for a generation"):
        write_generation(directory, files(a="x"), stamp)
    assert listing(directory) == {}


def test_no_files_or_duplicate_names_are_rejected(directory: Path) -> None:
    for wrong in ([], [*files(a="1"), *files(a="2")]):
        with pytest.raises(ValueError, match="unique file names"):
            write_generation(directory, wrong, "1")


def test_same_stamp_can_be_used_again(directory: Path) -> None:
    """The clock can stand still or go back."""
    for number in range(4):
        write_generation(directory, pair(number), "1")
        assert read_generation(directory)["site.key"] == f"{number} ".encode()
        assert len(settled(directory)) == 4


def test_error_contains_no_file_content(directory: Path) -> None:
    with faulty(3, stays_full), pytest.raises(CertmountError, match=r"^NoSpace: ") as caught:
        write_generation(directory, files(site_key="CANARY"), "1")
    assert "CANARY" not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"
    assert str(directory) in str(caught.value)
    assert "No space left on device" in str(caught.value)


def test_other_errors_are_not_reported_as_full_volume(tmp_path: Path) -> None:
    with pytest.raises(CertmountError, match=r"^MountFailed: "):
        write_generation(tmp_path / "nowhere", files(a="x"), "1")


def test_files_stay_if_the_volume_is_full_at_any_call(directory: Path) -> None:
    """Each system call in turn fails with ENOSPC: the old files stay, or the new ones are complete."""
    at, outcome, kept = 0, None, 0
    while outcome != "untouched":
        at += 1
        write_generation(directory, named(OLD), f"old{at}")
        assert settled(directory) == complete(f"old{at}", *OLD)
        with faulty(at, full_once) as replaced:
            try:
                write_generation(directory, named(NEW), "new")
            except CertmountError as error:
                assert error.reason is Reason.NO_SPACE
                outcome = "failed"
            else:
                outcome = "written" if replaced.calls >= at else "untouched"
        if outcome == "failed":
            kept += 1
            assert settled(directory) == complete(f"old{at}", *OLD)
        assert read_generation(directory) == (OLD if outcome == "failed" else NEW), at
    assert kept > 10


@pytest.mark.parametrize("fail", [stays_full, full_then_broken, killed])
def test_crash_at_any_call_leaves_complete_files(directory: Path, fail: Callable[[int], None]) -> None:
    at, untouched, seen = 0, False, set()
    while not untouched:
        at += 1
        write_generation(directory, named(OLD), "old")
        with faulty(at, fail) as replaced:
            try:
                write_generation(directory, named(NEW), "new")
            except CertmountError as error:
                assert error.reason is Reason.NO_SPACE
            except Killed:
                pass
            else:
                untouched = replaced.calls < at
        found = read_generation(directory)
        assert found in (OLD, NEW), at
        shown = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        assert shown.items() <= found.items(), at
        seen.add(found == NEW)
        write_generation(directory, named(OLD), "repaired")
        assert settled(directory) == complete("repaired", *OLD), at
    assert seen == {True, False}


def test_nothing_is_removed_if_the_current_generation_is_unknown(directory: Path) -> None:
    write_generation(directory, named(OLD), "1")
    with faulty(1, full_once, ["readlink"]), pytest.raises(CertmountError):
        write_generation(directory, named(NEW), "2")
    assert settled(directory) == complete("1", *OLD)


def test_interruption_after_the_swap_keeps_the_new_files(directory: Path) -> None:
    """Readers may use them already."""
    write_generation(directory, named(OLD), "1")
    links_and_swap = len(NEW.keys() - OLD.keys()) + 1
    with faulty(links_and_swap, killed, ["rename"], late=True), pytest.raises(Killed):
        write_generation(directory, named(NEW), "2")
    assert read_generation(directory) == NEW
    assert {name: (directory / name).read_bytes() for name in NEW} == NEW


def test_leftovers_of_a_crash_are_removed(directory: Path) -> None:
    write_generation(directory, pair(1), "1")
    (directory / "..2").mkdir()
    (directory / "..2" / "site.key").write_text("half")
    (directory / "..data_tmp").symlink_to("..2")
    (directory / "..link_tmp").symlink_to("..data/x")
    (directory / "gone.crt").symlink_to("..data/gone.crt")
    write_generation(directory, pair(3), "3")
    assert settled(directory) == complete("3", "site.crt", "site.key")


def test_reading_an_empty_volume_raises_volume_not_found(directory: Path) -> None:
    with pytest.raises(CertmountError, match=r"^VolumeNotFound: "):
        read_generation(directory)


def test_reading_is_limited(directory: Path) -> None:
    """A file that root has enlarged does not fill the driver's memory."""
    write_generation(directory, files(a="x", b="x"), "1")
    half = b"x" * (MAX_READ_BYTES // 2 + 1)
    (directory / "a").write_bytes(half)
    assert read_generation(directory)["a"] == half
    (directory / "b").write_bytes(half)
    with pytest.raises(CertmountError, match=r"^InternalError: "):
        read_generation(directory)


def test_reading_gives_up_if_the_generation_cannot_be_opened(directory: Path) -> None:
    (directory / "..data").symlink_to("..nowhere")
    with pytest.raises(CertmountError, match=r"^VolumeRemoved: "):
        read_generation(directory)


file_names = st.sampled_from(["root.crt", "site.crt", "site.key", "site.pem", "a", ".hidden", "-", "ü", "x" * 255])
generation_contents = st.dictionaries(file_names, st.binary(max_size=9000), min_size=1, max_size=5)


@given(st.lists(generation_contents, min_size=1, max_size=5))
def test_directory_shows_the_last_files(history: list[dict[str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for number, contents in enumerate(history):
            write_generation(directory, named(contents), str(number))
            assert read_generation(directory) == contents
            assert settled(directory) == complete(str(number), *contents)


@settings(max_examples=15)  # each example is dozens of swaps
@given(swaps=st.integers(20, 60), size=st.integers(1, 3000))
def test_concurrent_readers_see_matching_pairs(swaps: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_generation(directory, pair(0, size), "0")
        done = threading.Event()
        seen: list[dict[str, bytes]] = []
        failures: list[BaseException] = []

        def read() -> None:
            try:
                while not done.is_set():
                    seen.append(read_generation(directory))
            except CertmountError as error:
                failures.append(error)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for number in range(1, swaps):
                write_generation(directory, pair(number, size), str(number))
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert failures == []
        assert all(found.keys() == {"site.crt", "site.key"} for found in seen)
        assert all(found["site.crt"] == found["site.key"] for found in seen)


def test_time_of_the_last_replacement(tmp_path: Path) -> None:
    """The first files replace nothing."""
    assert replaced_at(tmp_path / "missing") is None
    assert replaced_at(tmp_path) is None
    write_generation(tmp_path, pair(1), "1")
    assert replaced_at(tmp_path) is None
    write_generation(tmp_path, pair(2), "2")
    assert replaced_at(tmp_path) == (tmp_path / "..data").lstat().st_mtime
