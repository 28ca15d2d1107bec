"""The driver gives up the privileges that its container has only because mount propagation requires a privileged one."""

from __future__ import annotations

import ctypes
import os
import struct

CAP_CHOWN, CAP_KILL, CAP_SYS_ADMIN = 0, 5, 21  # capabilities(7): give keys to the pod's group, signal, and mount
NEEDED = (1 << CAP_CHOWN) | (1 << CAP_SYS_ADMIN)
_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3 = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words for each set

_libc = ctypes.CDLL(None, use_errno=True)


def drop_capabilities(*, signals: bool = False) -> None:
    """Keep only the needed capabilities, for this thread and the threads that it starts; no program can get others. Raises OSError.

    Call it before other threads start. A process without root keeps nothing. ``signals`` keeps CAP_KILL too.
    """
    needed = NEEDED | (1 << CAP_KILL if signals else 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, sets))
    effective, permitted = struct.unpack("6I", sets.raw)[:2]
    kept = struct.pack("6I", effective & needed, permitted & needed, 0, 0, 0, 0)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc.capset(header, ctypes.create_string_buffer(kept, len(kept))))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
