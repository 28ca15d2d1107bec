"""Mount system calls that Python does not provide. Each raises OSError.

The numbers of open_tree, move_mount and mount_setattr are the same on all architectures that Kubernetes supports.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000

MNT_DETACH: Final = 0x2
UMOUNT_NOFOLLOW: Final = 0x8

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8

_OPEN_TREE: Final = 428
_MOVE_MOUNT: Final = 429
_MOUNT_SETATTR: Final = 442

_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 0x1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.mount.restype = ctypes.c_int
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.umount2.restype = ctypes.c_int
_libc.syscall.restype = ctypes.c_long


def mount(source: str | None, target: str, fs_type: str | None, flags: int, data: str | None = None) -> None:
    _checked(_libc.mount(_bytes(source), _bytes(target), _bytes(fs_type), flags, _bytes(data)))


def unmount(target: str, flags: int) -> None:
    _checked(_libc.umount2(_bytes(target), flags))


def clone_tree(path: str) -> int:
    """Return a descriptor of a detached copy of a mount: open_tree(2), Linux 5.2. Closing it removes the copy."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_SYMLINK_NOFOLLOW
    return _call(_OPEN_TREE, ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(_bytes(path)), ctypes.c_uint(flags))


def set_mount_attributes(tree: int, attributes: int) -> None:
    """Set MOUNT_ATTR_* on a detached mount: mount_setattr(2), Linux 5.12."""
    size = 32  # struct mount_attr: attr_set, attr_clr, propagation and userns_fd, 64 bits each
    values = (ctypes.c_uint64 * 4)(attributes)
    flags = ctypes.c_uint(_AT_EMPTY_PATH)
    _call(_MOUNT_SETATTR, ctypes.c_int(tree), ctypes.c_char_p(b""), flags, ctypes.byref(values), ctypes.c_size_t(size))


def attach_tree(tree: int, target: int) -> None:
    """Attach a detached mount to the open directory ``target``: move_mount(2), Linux 5.2."""
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)
    empty = ctypes.c_char_p(b"")
    _call(_MOVE_MOUNT, ctypes.c_int(tree), empty, ctypes.c_int(target), empty, flags)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def _call(number: int, *arguments: object) -> int:
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
