"""Replace all files of a volume atomically: the symbolic link ``..data`` points to the current generation.

The layout is that of Kubernetes Secret and ConfigMap volumes, so programs that watch those (the directory, for
``MOVED_TO ..data``) also detect our changes::

    ..2026_11_22_10_00_00.123456/site.crt
    ..data -> ..2026_11_22_10_00_00.123456
    site.crt -> ..data/site.crt

Next to the files directory, a private directory has what the driver itself needs of the current generation. Pods do not
see it, and it changes together with the files, because ``..data`` also names its file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.host.directories import open_descriptor
from csi_driver.host.os_errors import translate_os_errors

DATA: Final = "..data"
PRIVATE: Final = "private"
MAX_READ_BYTES: Final = 1 << 20

_DATA_TMP: Final = "..data_tmp"
_LINK_TMP: Final = "..link_tmp"
_STAMP: Final = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,99}")
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_ATTEMPTS: Final = 1000
_FULL_HINT: Final = "the volume must have space for the old and the new files; use fewer names or a smaller key"


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """A file with its exact mode, and the IDs of its group and its owner (None: the driver's own).

    Raises ValueError if the name is not a plain file name or starts with "..", or if the mode exceeds 0777.
    """

    name: str
    content: Secret[bytes]
    mode: int
    gid: int | None
    uid: int | None = None

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".") and not self.name.startswith("..") and not set("/\0") & set(self.name)
        if not plain or len(os.fsencode(self.name)) > 255:
            raise ValueError(f"{self.name!r} is not a valid name for a file of a volume")
        if not 0 <= self.mode <= 0o777:
            raise ValueError(f"{self.name}: {self.mode:o} is not a file mode")


def write_generation(
    files_dir: Path, files: Sequence[VolumeFile], stamp: str, private: Secret[bytes] | None = None
) -> None:
    """Replace all files of a volume with ``files``; ``stamp`` names the generation. Supports one caller per volume.

    :func:`read_private` returns ``private``, which is stored outside the files directory.

    On failure the old files stay, and the call raises CertmountError NO_SPACE or MOUNT_FAILED. Each call removes what a
    crash left behind.

    The previous generation stays until the next call. A process that has just resolved ``..data``, or that reads the
    certificate and then the key in that directory, still finds its files.
    """
    names = {file.name for file in files}
    if not files or len(names) != len(files):
        raise ValueError("a generation needs at least one file, and unique file names")
    if not _STAMP.fullmatch(stamp) or f"..{stamp}" in (DATA, _DATA_TMP, _LINK_TMP):
        raise ValueError(f"{stamp!r} is not a valid name for a generation")
    writing = translate_os_errors("volume", "write the files in", files_dir, _FULL_HINT)
    with writing, open_descriptor(files_dir, _DIRECTORY) as root:
        current = _current(root)
        _remove_generations(root, keep=current)
        # The clock can stand still, or go back to the time of the current generation.
        generation = f"..{stamp}-again" if current == f"..{stamp}" else f"..{stamp}"
        links: list[str] = []
        try:
            if private is not None:
                _write_private(files_dir, generation, private, keep=current)
            _write_files(root, generation, files)
            # Create links before the swap: if they came after it, a full volume would leave files without links.
            links.extend(name for name in sorted(names) if _link(root, name))
            os.symlink(generation, _DATA_TMP, dir_fd=root)
            os.rename(_DATA_TMP, DATA, src_dir_fd=root, dst_dir_fd=root)
        except BaseException:
            with suppress(OSError):  # report the first failure; the next call removes the rest
                _undo(root, generation, links)
                if private is not None:
                    _remove_private(files_dir, keep={_current(root)})
            raise
        with suppress(OSError):  # the new files are in place; failing to remove old links is not a failure
            _remove_links(root, keep=names)
            if private is not None:
                _remove_private(files_dir, keep={generation})


def read_generation(files_dir: Path) -> dict[str, bytes]:
    """Return the files of one generation, at most ``MAX_READ_BYTES`` in total.

    Raises CertmountError VOLUME_NOT_FOUND if the volume has no files, or INTERNAL if they are larger.
    """
    data = files_dir / DATA
    for _ in range(_READ_ATTEMPTS):
        reading = translate_os_errors("volume", "read the files in", files_dir)
        with reading, suppress(FileNotFoundError), open_descriptor(data, _DIRECTORY) as generation:
            files = _read_files(generation)
            # A generation is deleted only after a swap. If it is still current, the files are complete.
            if os.path.samestat(os.fstat(generation), data.stat()):
                return files
        if not os.path.lexists(data):
            raise CertmountError(Reason.VOLUME_NOT_FOUND, Fault("volume", f"{files_dir} has no files"))
    raise CertmountError(Reason.VOLUME_REMOVED, Fault("volume", f"the files in {files_dir} change constantly"))


def read_private(files_dir: Path) -> Secret[bytes]:
    """Return what :func:`write_generation` stored with the current generation; raises CertmountError VOLUME_NOT_FOUND."""
    reading, private = translate_os_errors("volume", "read the files in", files_dir), files_dir.with_name(PRIVATE)
    with reading, suppress(FileNotFoundError), open_descriptor(files_dir, _DIRECTORY) as root:
        for _ in range(_READ_ATTEMPTS):
            current = _current(root)
            if current is None:
                break
            with suppress(FileNotFoundError), (private / current).open("rb") as file:
                return Secret(file.read(MAX_READ_BYTES + 1))
            if current == _current(root):  # no new generation has replaced it meanwhile
                break
    raise CertmountError(Reason.VOLUME_NOT_FOUND, Fault("volume", f"{files_dir} has no files of the driver"))


def replaced_at(files_dir: Path) -> float | None:
    """Return the unix time of the last replacement of the files, or None if they are the first, or cannot be read."""
    with suppress(OSError), open_descriptor(files_dir, _DIRECTORY) as root:
        others = {name for name in _names(root) if name.startswith("..")} - {DATA, _DATA_TMP, _LINK_TMP, _current(root)}
        return os.lstat(DATA, dir_fd=root).st_mtime if others else None
    return None


def erase_files(directory: int) -> None:
    """Remove all files from the open files directory or private directory, so that no other mount of it keeps a key."""
    _remove_generations(directory, keep=None)
    _remove_links(directory, keep=set())


def _write_private(files_dir: Path, generation: str, content: Secret[bytes], keep: str | None) -> None:
    _remove_private(files_dir, keep={keep})
    with open_descriptor(files_dir.with_name(PRIVATE), _DIRECTORY) as directory:
        _write_file(directory, generation, content, 0o600)


def _remove_private(files_dir: Path, keep: set[str | None]) -> None:
    with open_descriptor(files_dir.with_name(PRIVATE), _DIRECTORY) as directory:
        for name in _names(directory):
            if name not in keep:
                os.unlink(name, dir_fd=directory)


def _write_files(root: int, generation: str, files: Sequence[VolumeFile]) -> None:
    os.mkdir(generation, 0o700, dir_fd=root)
    with open_descriptor(generation, _DIRECTORY | os.O_NOFOLLOW, root) as directory:
        for file in files:
            _write_file(directory, file.name, file.content, file.mode, file.uid, file.gid)
        os.fchmod(directory, 0o755)


def _write_file(
    directory: int, name: str, content: Secret[bytes], mode: int, uid: int | None = None, gid: int | None = None
) -> None:
    descriptor = os.open(name, _NEW_FILE, 0, dir_fd=directory)
    try:
        os.fchmod(descriptor, mode)  # before the owner changes: the driver has no capability to change others' files
        if uid is not None or gid is not None:
            os.fchown(descriptor, -1 if uid is None else uid, -1 if gid is None else gid)
        remaining = memoryview(content.reveal())
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
    finally:
        os.close(descriptor)


def _link(root: int, name: str) -> bool:
    """Create the link to a file. Return False if it exists already."""
    target = f"{DATA}/{name}"
    if _readlink(root, name) == target:
        return False
    os.symlink(target, _LINK_TMP, dir_fd=root)
    os.rename(_LINK_TMP, name, src_dir_fd=root, dst_dir_fd=root)
    return True


def _undo(root: int, generation: str, links: list[str]) -> None:
    current = _current(root)
    if current == generation:  # interrupted after the swap
        return
    for name in links:
        os.unlink(name, dir_fd=root)
    _remove_generations(root, keep=current)


def _remove_generations(root: int, keep: str | None) -> None:
    """Remove all generations except ``keep``, and the temporary links of a crash."""
    with os.scandir(root) as entries:
        hidden = [entry for entry in entries if entry.name.startswith("..") and entry.name != keep]
    for entry in hidden:
        if entry.is_dir(follow_symlinks=False):
            _remove_generation(root, entry.name)
        elif entry.name != DATA or keep is None:
            os.unlink(entry.name, dir_fd=root)


def _remove_generation(root: int, name: str) -> None:
    with open_descriptor(name, _DIRECTORY | os.O_NOFOLLOW, root) as directory:
        for file in _names(directory):
            os.unlink(file, dir_fd=directory)
    os.rmdir(name, dir_fd=root)


def _remove_links(root: int, keep: set[str]) -> None:
    for name in _names(root):
        if not name.startswith("..") and name not in keep:
            os.unlink(name, dir_fd=root)


def _current(root: int) -> str | None:
    return _readlink(root, DATA)


def _readlink(root: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=root)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EINVAL:  # only EINVAL means "not a link"; a wrong guess would delete current files
            raise
        return None


def _read_files(directory: int) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    remaining = MAX_READ_BYTES
    for name in sorted(_names(directory)):
        with open(
            name, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, dir_fd=directory)
        ) as file:
            files[name] = file.read(remaining + 1)
        remaining -= len(files[name])
        if remaining < 0:
            raise CertmountError(Reason.INTERNAL, Fault("volume", f"has more than {MAX_READ_BYTES} bytes of files"))
    return files


def _names(directory: int) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries]
