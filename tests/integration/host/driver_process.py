"""A driver process, to run with a mount namespace, a system call filter or without capabilities.

    python -m tests.integration.host.driver_process COMMAND KUBELET TARGET

With the prefix ``old-kernel-``, open_tree and mount_setattr fail with ENOSYS.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from pathlib import Path

from csi_driver.core.errors import CertmountError
from csi_driver.host.generations import write_generation
from csi_driver.host.mounts import KernelMounts
from csi_driver.host.volume_store import VolumeStore
from tests.unit.host.samples import VOLUME_ID, pair, record

_OLD_KERNEL = "old-kernel-"
_DISABLED = {"open_tree": 428, "mount_setattr": 442}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2


def disable_new_system_calls() -> None:
    """Install a seccomp(2) filter that disables the newer mount calls."""
    load, equal, answer = 0x20, 0x15, 0x06
    allow, no_such_call = 0x7FFF0000, 0x00050000 | 38
    code = struct.pack("HBBI", load, 0, 0, 0)
    for number in _DISABLED.values():
        code += struct.pack("HBBI", equal, 0, 1, number) + struct.pack("HBBI", answer, 0, 0, no_such_call)
    code += struct.pack("HBBI", answer, 0, 0, allow)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot install the filter")


def run(command: str, kubelet: Path, target: Path) -> None:
    if command.startswith(_OLD_KERNEL):
        disable_new_system_calls()
    store = VolumeStore(kubelet / "plugins" / "csi.certmount.dev" / "volumes", kubelet, KernelMounts())
    match command.removeprefix(_OLD_KERNEL):
        case "publish":
            store.create(VOLUME_ID)
            write_generation(store.files_dir(VOLUME_ID), pair(1), "1")
            store.write_record(record(str(target)))
            store.bind(VOLUME_ID, target)
        case "renew":
            if [found.volume_id for found in store.scan().records] != [VOLUME_ID]:
                raise SystemExit("the volume was not found")
            write_generation(store.files_dir(VOLUME_ID), pair(2), "2")
        case "unpublish":
            store.unbind(target)
            store.remove(VOLUME_ID)


if __name__ == "__main__":
    try:
        run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except CertmountError as error:
        raise SystemExit(str(error)) from error
