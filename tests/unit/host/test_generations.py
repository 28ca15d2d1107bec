"""The files of a volume change all at once, or not at all."""

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
from csi_driver.host.generations import MAX_READ_BYTES, VolumeFile, read_generation, write_generation
from tests.unit.host.samples import files, pair

CALLS = ("mkdir", "open", "fchown", "fchmod", "write", "symlink", "rename", "unlink", "rmdir", "readlink", "scandir")
OLD = {"a.crt": b"old", "b.crt": b"old"}
NEW = {"b.crt": b"new", "c.crt": b"new"}


def listing(folder: Path) -> dict[str, list[str]]:
    """All that is in a files folder: links as where they lead, folders as what they hold."""
    return {
        path.name: [str(path.readlink())] if path.is_symlink() else sorted(child.name for child in path.iterdir())
        for path in folder.iterdir()
    }


def complete(stamp: str, *names: str) -> dict[str, list[str]]:
    """The listing of a folder with one generation and nothing else."""
    return {f"..{stamp}": sorted(names), "..data": [f"..{stamp}"]} | {name: [f"..data/{name}"] for name in names}


def settled(folder: Path) -> dict[str, list[str]]:
    """The listing without the one generation before the current one, which late readers may still be in."""
    found = listing(folder)
    current = found["..data"][0]
    others = [name for name in found if name.startswith("..") and name not in ("..data", current)]
    assert len(others) <= 1, others
    return {name: entry for name, entry in found.items() if name not in others}


class FaultyOs:
    """The os module, until call number ``at`` of those in ``names``: then ``fail`` decides, ``late`` after it was done."""

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
    """Stands for SIGKILL: nothing that would clean up works after it."""


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


def full_for_good(later: int) -> None:  # noqa: ARG001 - any later call fails likewise
    raise OSError(errno.ENOSPC, "full")


def full_then_broken(later: int) -> None:
    raise OSError(errno.EIO if later else errno.ENOSPC, "broken")


def killed(later: int) -> None:  # noqa: ARG001 - as above
    raise Killed


def named(contents: dict[str, bytes]) -> list[VolumeFile]:
    return [VolumeFile(name, Secret(content), 0o644, None) for name, content in contents.items()]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_a_reader_finds_the_files_by_their_names(folder: Path) -> None:
    """The layout is that of a Kubernetes Secret volume: a link per file, through ``..data``, to one generation."""
    write_generation(folder, files(root_crt="r", site_crt="c"), "2026_11_22_10_00_00.123456")
    assert settled(folder) == complete("2026_11_22_10_00_00.123456", "root.crt", "site.crt")
    assert (folder / "site.crt").read_text() == "c"
    assert read_generation(folder) == {"root.crt": b"r", "site.crt": b"c"}


def test_a_new_generation_replaces_the_old_one(folder: Path) -> None:
    """Names come and go, contents change, and the link of a name that went is gone."""
    write_generation(folder, named(OLD), "1")
    write_generation(folder, named(NEW), "2")
    assert settled(folder) == complete("2", "b.crt", "c.crt")
    assert read_generation(folder) == NEW


def test_a_reader_that_is_late_still_finds_its_generation(folder: Path) -> None:
    """Certificate and key read one after the other through ``..data`` as it was are a pair; two changes later they are gone."""
    write_generation(folder, pair(1), "1")
    followed = (folder / "..data").resolve()
    write_generation(folder, pair(2), "2")
    assert (followed / "site.crt").read_bytes() == (followed / "site.key").read_bytes() == b"1 "
    write_generation(folder, pair(3), "3")
    assert not followed.exists()


def test_modes_are_exact(folder: Path) -> None:
    """A file has the mode it was given, whatever the process's umask is; its generation can be entered by all."""
    before = os.umask(0o077)
    try:
        write_generation(
            folder, [VolumeFile("a", Secret(b""), 0o440, os.getgid()), VolumeFile("b", Secret(b""), 0o666, None)], "1"
        )
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o440
    assert stat.S_IMODE((folder / "b").stat().st_mode) == 0o666
    assert stat.S_IMODE((folder / "..1").stat().st_mode) == 0o755
    assert (folder / "a").stat().st_gid == os.getgid()


@pytest.mark.parametrize("name", ["", ".", "..", "..data", "..x", "a/b", "/", "a\0", "x" * 256, "ü" * 128])
def test_a_name_that_is_a_path_is_refused(name: str) -> None:
    """No file can lie elsewhere or look like a generation."""
    with pytest.raises(ValueError, match="is no name"):
        VolumeFile(name, Secret(b""), 0o644, None)


@pytest.mark.parametrize("mode", [-1, 0o1000, 0o4755])
def test_a_mode_with_special_bits_is_refused(mode: int) -> None:
    """No set-user-id, no sticky bit."""
    with pytest.raises(ValueError, match="is no file mode"):
        VolumeFile("a", Secret(b""), mode, None)


@pytest.mark.parametrize("stamp", ["", "data", "data_tmp", "link_tmp", "../x", "a/b", ".a", "a\n", "x" * 101])
def test_a_stamp_that_is_a_path_is_refused(folder: Path, stamp: str) -> None:
    """A generation's name is plain, and none of those that the swap itself uses."""
    with pytest.raises(ValueError, match="is no name for a generation"):
        write_generation(folder, files(a="x"), stamp)
    assert listing(folder) == {}


def test_an_empty_or_ambiguous_set_is_refused(folder: Path) -> None:
    """A volume is never shown without files, and each name means one file."""
    for wrong in ([], [*files(a="1"), *files(a="2")]):
        with pytest.raises(ValueError, match="each with its own name"):
            write_generation(folder, wrong, "1")


def test_a_clock_that_stands_still_does_no_harm(folder: Path) -> None:
    """The same stamp twice, thrice: each time the new files replace the old ones."""
    for number in range(4):
        write_generation(folder, pair(number), "1")
        assert read_generation(folder)["site.key"] == f"{number} ".encode()
        assert len(settled(folder)) == 4


def test_a_secret_is_in_no_error(folder: Path) -> None:
    """A failed write tells the folder and the kernel's words, not the content."""
    with faulty(3, full_for_good), pytest.raises(CertmountError) as caught:
        write_generation(folder, files(site_key="CANARY"), "1")
    assert caught.value.reason is Reason.NO_SPACE
    assert "CANARY" not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"
    assert str(folder) in str(caught.value)
    assert "No space left on device" in str(caught.value)


def test_other_failures_are_no_full_volume(tmp_path: Path) -> None:
    """Only what is full is called full."""
    with pytest.raises(CertmountError) as caught:
        write_generation(tmp_path / "nowhere", files(a="x"), "1")
    assert caught.value.reason is Reason.MOUNT_FAILED


def test_a_volume_that_fills_up_anywhere_keeps_its_files(folder: Path) -> None:
    """Each call to the kernel in turn fails with ENOSPC: the old set stays to the last link, or the new one is there."""
    at, outcome, kept = 0, None, 0
    while outcome != "untouched":
        at += 1
        write_generation(folder, named(OLD), f"old{at}")
        assert settled(folder) == complete(f"old{at}", *OLD)
        with faulty(at, full_once) as replaced:
            try:
                write_generation(folder, named(NEW), "new")
            except CertmountError as error:
                assert error.reason is Reason.NO_SPACE
                outcome = "refused"
            else:
                outcome = "written" if replaced.calls >= at else "untouched"
        if outcome == "refused":
            kept += 1
            assert settled(folder) == complete(f"old{at}", *OLD)
        assert read_generation(folder) == (OLD if outcome == "refused" else NEW), at
    assert kept > 10


@pytest.mark.parametrize("fail", [full_for_good, full_then_broken, killed])
def test_a_crash_anywhere_leaves_a_whole_set_and_is_repaired(folder: Path, fail: Callable[[int], None]) -> None:
    """Killed at each call in turn: readers see the old or the new set, and the next write leaves no trace of it."""
    at, untouched, seen = 0, False, set()
    while not untouched:
        at += 1
        write_generation(folder, named(OLD), "old")
        with faulty(at, fail) as replaced:
            try:
                write_generation(folder, named(NEW), "new")
            except CertmountError as error:
                assert error.reason is Reason.NO_SPACE
            except Killed:
                pass
            else:
                untouched = replaced.calls < at
        found = read_generation(folder)
        assert found in (OLD, NEW), at
        shown = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert shown.items() <= found.items(), at
        seen.add(found == NEW)
        write_generation(folder, named(OLD), "repaired")
        assert settled(folder) == complete("repaired", *OLD), at
    assert seen == {True, False}


def test_live_files_that_cannot_be_told_apart_are_left_alone(folder: Path) -> None:
    """When the kernel will not say which generation is current, none is removed."""
    write_generation(folder, named(OLD), "1")
    with faulty(1, full_once, ["readlink"]), pytest.raises(CertmountError):
        write_generation(folder, named(NEW), "2")
    assert settled(folder) == complete("1", *OLD)


def test_an_interruption_after_the_swap_keeps_the_new_files(folder: Path) -> None:
    """Once readers see the new generation it is not taken back, whatever comes between."""
    write_generation(folder, named(OLD), "1")
    links_and_swap = len(NEW.keys() - OLD.keys()) + 1
    with faulty(links_and_swap, killed, ["rename"], late=True), pytest.raises(Killed):
        write_generation(folder, named(NEW), "2")
    assert read_generation(folder) == NEW
    assert {name: (folder / name).read_bytes() for name in NEW} == NEW


def test_leftovers_of_a_crash_are_removed(folder: Path) -> None:
    """Half a generation, half a swap and a stale link of a driver that was killed go with the next write."""
    write_generation(folder, pair(1), "1")
    (folder / "..2").mkdir()
    (folder / "..2" / "site.key").write_text("half")
    (folder / "..data_tmp").symlink_to("..2")
    (folder / "..link_tmp").symlink_to("..data/x")
    (folder / "gone.crt").symlink_to("..data/gone.crt")
    write_generation(folder, pair(3), "3")
    assert settled(folder) == complete("3", "site.crt", "site.key")


def test_reading_before_the_first_write_says_so(folder: Path) -> None:
    """An empty volume has no files, and that is no crash."""
    with pytest.raises(CertmountError) as caught:
        read_generation(folder)
    assert caught.value.reason is Reason.VOLUME_NOT_FOUND


def test_reading_is_bounded(folder: Path) -> None:
    """A file that someone with root has blown up does not fill the driver's memory."""
    write_generation(folder, files(a="x", b="x"), "1")
    half = b"x" * (MAX_READ_BYTES // 2 + 1)
    (folder / "a").write_bytes(half)
    assert read_generation(folder)["a"] == half
    (folder / "b").write_bytes(half)
    with pytest.raises(CertmountError) as caught:
        read_generation(folder)
    assert caught.value.reason is Reason.INTERNAL


def test_a_generation_that_always_changes_is_given_up(folder: Path) -> None:
    """A current generation that can't be entered ends in an error to try again, not in an endless loop."""
    (folder / "..data").symlink_to("..nowhere")
    with pytest.raises(CertmountError) as caught:
        read_generation(folder)
    assert caught.value.reason is Reason.VOLUME_REMOVED


file_names = st.sampled_from(["root.crt", "site.crt", "site.key", "site.pem", "a", ".hidden", "-", "ü", "x" * 255])
generation_contents = st.dictionaries(file_names, st.binary(max_size=9000), min_size=1, max_size=5)


@given(st.lists(generation_contents, min_size=1, max_size=5))
def test_a_volume_is_always_its_newest_set(history: list[dict[str, bytes]]) -> None:
    """Whatever sets follow each other, the folder shows the last one, and of those before only one is still there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, contents in enumerate(history):
            write_generation(folder, named(contents), str(number))
            assert read_generation(folder) == contents
            assert settled(folder) == complete(str(number), *contents)


@settings(max_examples=15)  # each example is dozens of swaps
@given(swaps=st.integers(20, 60), size=st.integers(1, 3000))
def test_a_reader_never_sees_a_torn_pair(swaps: int, size: int) -> None:
    """Two threads read while a third swaps: certificate and key are always of the same generation, and never old again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_generation(folder, pair(0, size), "0")
        done = threading.Event()
        seen: list[dict[str, bytes]] = []
        failures: list[BaseException] = []

        def read() -> None:
            try:
                while not done.is_set():
                    seen.append(read_generation(folder))
            except CertmountError as error:
                failures.append(error)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for number in range(1, swaps):
                write_generation(folder, pair(number, size), str(number))
        finally:
            done.set()
            for reader in readers:
                reader.join()
        assert failures == []
        assert all(found.keys() == {"site.crt", "site.key"} for found in seen)
        assert all(found["site.crt"] == found["site.key"] for found in seen)
