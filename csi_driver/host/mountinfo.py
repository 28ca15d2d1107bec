"""Read the kernel's mount table, proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNTINFO: Final = Path("/proc/self/mountinfo")

_ESCAPE: Final = re.compile(rb"\\([0-3][0-7]{2})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of the table. Paths are as this process sees them, without symbolic links."""

    id: int
    parent: int
    device: str  # "major:minor"
    root: str  # the mounted directory within the file system
    point: str
    options: frozenset[str]  # of this mount, for example "ro"
    propagation: tuple[str, ...]  # the optional fields: "shared:7", "master:3", ...
    fs_type: str
    source: str
    super_options: frozenset[str]  # of the file system


def read_mounts(path: Path = MOUNTINFO) -> Iterator[MountEntry]:
    """Yield all mounts of the table, oldest first. Skip malformed lines."""
    with path.open("rb") as table:
        for line in table:
            mount = parse_mount(line)
            if mount is not None:
                yield mount


def find_mount(identifier: int, path: Path = MOUNTINFO) -> MountEntry | None:
    """Return the mount with this ID, or None. Parse only its line, because the table can be long."""
    start = b"%d " % identifier
    with path.open("rb") as table:
        return next((parse_mount(line) for line in table if line.startswith(start)), None)


def parse_mount(line: bytes) -> MountEntry | None:
    own, separator, shared = line.removesuffix(b"\n").partition(b" - ")
    # Split at single spaces, because the mount source can be an empty string.
    fields, system = own.split(b" "), shared.split(b" ")
    if not separator or len(fields) < 6 or len(system) != 3:
        return None
    if not (fields[0].isdigit() and fields[1].isdigit()):
        return None
    return MountEntry(
        id=int(fields[0]),
        parent=int(fields[1]),
        device=os.fsdecode(fields[2]),
        root=_text(fields[3]),
        point=_text(fields[4]),
        options=_words(fields[5]),
        propagation=tuple(os.fsdecode(field) for field in fields[6:]),
        fs_type=_text(system[0]),
        source=_text(system[1]),
        super_options=_words(system[2]),
    )


def mount_id(descriptor: int) -> int:
    """Return the ID of the mount that contains an open file, proc_pid_fdinfo(5)."""
    with Path(f"/proc/self/fdinfo/{descriptor}").open("rb", buffering=0) as details:
        for line in details.read(1024).splitlines():
            name, _, value = line.partition(b":")
            if name == b"mnt_id":
                return int(value)
    raise OSError(f"/proc/self/fdinfo/{descriptor} has no mnt_id")


def _text(field: bytes) -> str:
    if b"\\" in field:  # rare, and the substitution is slow
        field = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
    return os.fsdecode(field)


def _words(field: bytes) -> frozenset[str]:
    return frozenset(_text(word) for word in field.split(b",") if word)
