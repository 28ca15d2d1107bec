"""The files of a volume, exchanged as one: ``..data`` leads to the current generation, and is swapped by one rename.

The layout is the one that Kubernetes uses for its own Secret and ConfigMap volumes, so every program that watches those
(the folder, for ``MOVED_TO ..data``) sees ours too::

    ..2026_11_22_10_00_00.123456/site.crt
    ..data -> ..2026_11_22_10_00_00.123456
    site.crt -> ..data/site.crt
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.host.os_errors import translate_os_errors

DATA: Final = "..data"
MAX_READ_BYTES: Final = 1 << 20

_DATA_TMP: Final = "..data_tmp"
_LINK_TMP: Final = "..link_tmp"
_STAMP: Final = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,99}")
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_ATTEMPTS: Final = 1000
_FULL_HINT: Final = "the volume holds the old and the new files for a moment: fewer names or a smaller key make room"


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """One file: its exact mode, and its group (None: the driver's own). The owner is always the driver's user.

    ValueError for a name that is no plain file name or starts with "..", and for modes beyond 0777.
    """

    name: str
    content: Secret[bytes]
    mode: int
    gid: int | None

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".") and not self.name.startswith("..") and not set("/\0") & set(self.name)
        if not plain or len(os.fsencode(self.name)) > 255:
            raise ValueError(f"{self.name!r} is no name for a file of a volume")
        if not 0 <= self.mode <= 0o777:
            raise ValueError(f"{self.name}: {self.mode:o} is no file mode")


def write_generation(files_dir: Path, files: Sequence[VolumeFile], stamp: str) -> None:
    """Replaces what the volume shows by ``files``, all at once; ``stamp`` names the generation.

    A failure leaves what was there before, whole, and raises CertmountError: NO_SPACE when the volume is full, else
    MOUNT_FAILED. What a crash left behind is removed by the next call. One caller per volume at a time.

    The generation before stays until the next call: whoever has just followed ``..data``, or reads certificate and key one
    after the other in the folder it led to, still finds them.
    """
    names = {file.name for file in files}
    if not files or len(names) != len(files):
        raise ValueError("a generation needs files, each with its own name")
    if not _STAMP.fullmatch(stamp) or f"..{stamp}" in (DATA, _DATA_TMP, _LINK_TMP):
        raise ValueError(f"{stamp!r} is no name for a generation")
    with translate_os_errors("volume", "write the files in", files_dir, _FULL_HINT), _opened(files_dir) as root:
        _remove_hidden(root, keep=_current(root))
        generation = _unused(root, f"..{stamp}")
        links: list[str] = []
        try:
            _fill(root, generation, files)
            # A link that leads nowhere for a moment is missing to a reader, as it would be without it; made after the
            # swap, a full volume would leave the new generation without its link.
            links.extend(name for name in sorted(names) if _link(root, name))
            os.symlink(generation, _DATA_TMP, dir_fd=root)
            os.rename(_DATA_TMP, DATA, src_dir_fd=root, dst_dir_fd=root)
        except BaseException:
            with suppress(OSError):  # the first failure is the one to tell; the next call removes what is left
                _undo(root, generation, links)
            raise
        with suppress(OSError):  # the new files are live: that old ones could not be removed is not a failure
            _remove_links(root, keep=names)


def read_generation(files_dir: Path) -> dict[str, bytes]:
    """The files of one generation, never a mixture; at most ``MAX_READ_BYTES`` in all.

    Raises CertmountError: VOLUME_NOT_FOUND when nothing was written yet, INTERNAL when there is more than that.
    """
    data = files_dir / DATA
    for _ in range(_READ_ATTEMPTS):
        with (
            translate_os_errors("volume", "read the files in", files_dir),
            suppress(FileNotFoundError),
            _opened(data) as folder,
        ):
            found = _read_all(folder)
            # A generation is deleted only after the swap, so if it is still current now, nothing was missing before.
            if os.path.samestat(os.fstat(folder), data.stat()):
                return found
        if not os.path.lexists(data):
            raise CertmountError(Reason.VOLUME_NOT_FOUND, Fault("volume", f"{files_dir} has no files"))
    raise CertmountError(Reason.VOLUME_REMOVED, Fault("volume", f"the files in {files_dir} change all the time"))


def erase_files(root: int) -> None:
    """Removes everything in the files folder that is open as ``root``, so that no forgotten mount of it keeps a key."""
    _remove_hidden(root, keep=None)
    _remove_links(root, keep=set())


def _fill(root: int, generation: str, files: Sequence[VolumeFile]) -> None:
    os.mkdir(generation, 0o700, dir_fd=root)
    folder = os.open(generation, _FOLDER | os.O_NOFOLLOW, dir_fd=root)
    try:
        for file in files:
            _write(folder, file)
        os.fchmod(folder, 0o755)
    finally:
        os.close(folder)


def _write(folder: int, file: VolumeFile) -> None:
    descriptor = os.open(file.name, _NEW_FILE, 0, dir_fd=folder)
    try:
        if file.gid is not None:
            os.fchown(descriptor, -1, file.gid)
        os.fchmod(descriptor, file.mode)
        rest = memoryview(file.content.reveal())
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


def _link(root: int, name: str) -> bool:
    """Makes the user's link to a file, and says whether it had to."""
    wanted = f"{DATA}/{name}"
    if _readlink(root, name) == wanted:
        return False
    os.symlink(wanted, _LINK_TMP, dir_fd=root)
    os.rename(_LINK_TMP, name, src_dir_fd=root, dst_dir_fd=root)
    return True


def _undo(root: int, generation: str, links: list[str]) -> None:
    current = _current(root)
    if current == generation:  # interrupted after the swap
        return
    for name in links:
        os.unlink(name, dir_fd=root)
    _remove_hidden(root, keep=current)


def _remove_hidden(root: int, keep: str | None) -> None:
    """Removes all generations but ``keep``, and what a crash left of a swap."""
    with os.scandir(root) as entries:
        hidden = [entry for entry in entries if entry.name.startswith("..") and entry.name != keep]
    for entry in hidden:
        if entry.is_dir(follow_symlinks=False):
            _remove_generation(root, entry.name)
        elif entry.name != DATA or keep is None:
            os.unlink(entry.name, dir_fd=root)


def _remove_generation(root: int, name: str) -> None:
    folder = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=root)
    try:
        for file in _names(folder):
            os.unlink(file, dir_fd=folder)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=root)


def _remove_links(root: int, keep: set[str]) -> None:
    for name in _names(root):
        if not name.startswith("..") and name not in keep:
            os.unlink(name, dir_fd=root)


def _unused(root: int, name: str) -> str:
    """``name``, or one like it when the clock stood still or went back to the current generation's time."""
    return f"{name}-again" if _current(root) == name else name


def _current(root: int) -> str | None:
    return _readlink(root, DATA)


def _readlink(root: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=root)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EINVAL:  # only that says that it is no link; a guess here would delete live files
            raise
        return None


def _read_all(folder: int) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    room = MAX_READ_BYTES
    for name in sorted(_names(folder)):
        with open(name, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, dir_fd=folder)) as file:
            found[name] = file.read(room + 1)
        room -= len(found[name])
        if room < 0:
            raise CertmountError(Reason.INTERNAL, Fault("volume", f"more than {MAX_READ_BYTES} bytes of files"))
    return found


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
