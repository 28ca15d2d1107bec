"""Find the processes of a pod and signal them. All functions block; run them in threads.

The driver needs the process IDs of the host and CAP_KILL for this. What decides whether a process belongs to a pod is the
directory of the pod's cgroup, which only the kubelet creates: a tenant chooses neither its path nor which processes of
others are below it. The names of cgroups below it, and the names of processes, are chosen by tenants.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.reload import Reload

MAX_CGROUPS: Final = 256
"""The cgroups of a pod that are searched. A container can create further ones in its own."""
MAX_PROCESSES: Final = 4096  # of a pod
MAX_SIGNALLED: Final = 16  # for one reload
_MAX_STATUS = 8192  # bytes of /proc/PID/status; about 1500 are normal
_UID = re.compile(r"[0-9a-f-]{32,36}", re.ASCII)
_HIERARCHIES = ("", "unified", "systemd", "pids", "memory")
"""Version 2; then the mounts of a host that has both versions, or version 1."""
_NO_PROCESS = (errno.ESRCH, errno.EINVAL, errno.ENOENT)
"""There is no process with the ID, or a thread of another process has it: EINVAL, since Linux 6.15 ENOENT."""
_NO_CGROUP = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)
"""The cgroup was removed, or it has threads of processes that its parent lists (cgroup version 2)."""


@dataclass(frozen=True, slots=True)
class _Process:
    name: str
    parent: int
    in_container: bool  # in another process ID namespace than the driver, which has that of the host


@dataclass(frozen=True, slots=True)
class PodProcesses:
    """The processes of pods. ``cgroups`` is the host's /sys/fs/cgroup."""

    cgroups: Path = Path("/sys/fs/cgroup")
    proc: Path = Path("/proc")

    def signal(self, pod_uid: str, reload: Reload) -> int:
        """Signal the main processes with the name: those whose parent does not have it too. Return their number.

        Only processes in containers of the pod count, so neither those of pods with the host's process IDs nor those of a
        container runtime that run in the pod's cgroup.

        Raises CertmountError: ReloadFailed if there is none, there are too many, or one cannot be signalled.
        """
        try:
            return self._signal(pod_uid, reload)
        except OSError as error:
            problem = f"cannot signal the process {reload.process}: {error.strerror}"
            raise _failure(problem, "the driver needs deploy/components/reload") from None

    def _signal(self, pod_uid: str, reload: Reload) -> int:
        listed = self._processes(self._pod_cgroups(pod_uid))
        named = {}
        for pid, cgroup in listed.items():
            process = self._read(pid)
            if process is not None and process.in_container and process.name == reload.process:
                named[pid] = process, cgroup
        main = {pid: cgroup for pid, (process, cgroup) in named.items() if process.parent not in named}
        if len(main) > MAX_SIGNALLED:
            raise _failure(f"{len(main)} processes have the name {reload.process}", f"at most {MAX_SIGNALLED} can")
        signalled = sum(self._signal_one(pid, cgroup, reload) for pid, cgroup in main.items())
        if not signalled:
            problem = f"no process in the containers of the pod has the name {reload.process}"
            raise _failure(problem, "run: kubectl exec POD -- cat /proc/1/comm")
        return signalled

    def _signal_one(self, pid: int, cgroup: str, reload: Reload) -> bool:
        """Signal a process. Return False if it has ended, or is another one than expected."""
        try:
            descriptor = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in _NO_PROCESS:
                return False
            raise
        try:
            # The descriptor could refer to a process that got the ID of one that has ended. While the process of the
            # descriptor exists, no other one has its ID; so what is true for the ID now is true for the process.
            process = self._read(pid)
            if pid not in _list_processes(cgroup, MAX_PROCESSES):
                return False
            if process is None or not process.in_container or process.name != reload.process:
                return False
            signal.pidfd_send_signal(descriptor, signal.Signals[f"SIG{reload.signal.value}"])
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _pod_cgroups(self, pod_uid: str) -> str:
        """Return the directory that the kubelet has created for the pod."""
        if not _UID.fullmatch(pod_uid):
            raise _failure(f"the pod's UID {pod_uid[:40]!a} is invalid")
        for hierarchy in _HIERARCHIES:
            for path in _kubelet_paths(pod_uid):
                if (found := self.cgroups / hierarchy / path).is_dir():
                    return str(found)
        problem = f"{self.cgroups} has no cgroup of the pod below kubepods or kubepods.slice"
        raise _failure(problem, "the driver needs deploy/components/reload")

    @staticmethod
    def _processes(pod_cgroup: str) -> Mapping[int, str]:
        """Return the processes of the pod, each with its cgroup."""
        processes: dict[int, str] = {}
        for number, cgroup in enumerate(_walk(pod_cgroup)):
            if number == MAX_CGROUPS:
                raise _failure(f"the pod has more than {MAX_CGROUPS} cgroups")
            processes.update(dict.fromkeys(_list_processes(cgroup, MAX_PROCESSES - len(processes)), cgroup))
        if 0 in processes:  # a process outside of the driver's process ID namespace
            raise _failure("the driver cannot see the pod's processes", "it needs deploy/components/reload")
        return processes

    def _read(self, pid: int) -> _Process | None:
        """Return the process with the ID, or None if there is none. The kernel escapes line breaks in its name."""
        try:
            with (self.proc / str(pid) / "status").open("rb") as file:
                text = file.read(_MAX_STATUS).decode("ascii", "backslashreplace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = dict(line.split(":\t", 1) for line in text.split("\n") if ":\t" in line)
        try:
            return _Process(fields["Name"], int(fields["PPid"]), len(fields["NSpid"].split()) > 1)
        except (KeyError, ValueError):
            return None


def _kubelet_paths(pod_uid: str) -> Iterator[str]:
    """Yield the possible paths of a pod's cgroup, for the kubelet's drivers cgroupfs and systemd and each QoS class."""
    escaped = pod_uid.replace("-", "_")
    for qos in ("burstable", "besteffort", ""):
        yield "/".join(part for part in ("kubepods", qos, f"pod{pod_uid}") if part)
        slices = [f"kubepods-{qos}.slice"] if qos else []
        prefix = f"kubepods-{qos}" if qos else "kubepods"
        yield "/".join(("kubepods.slice", *slices, f"{prefix}-pod{escaped}.slice"))


def _walk(cgroup: str) -> Iterator[str]:
    """Yield a cgroup and those below it. The caller limits their number."""
    waiting = [cgroup]
    while waiting:
        yield (current := waiting.pop())
        try:
            with os.scandir(current) as entries:
                children = (entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
                waiting += itertools.islice(children, max(MAX_CGROUPS + 1 - len(waiting), 0))  # one more is too many
        except FileNotFoundError:
            continue


def _list_processes(cgroup: str, limit: int) -> list[int]:
    """Return the IDs of the processes of a cgroup, without those below it."""
    size = 8 * limit + 8  # an ID has at most 7 digits
    try:
        with open(f"{cgroup}/cgroup.procs", "rb") as file:  # noqa: PTH123  # a name can have any bytes
            text = file.read(size)
    except OSError as error:
        if error.errno in _NO_CGROUP:
            return []
        raise
    found = [int(line) for line in text.split()]
    if len(found) > limit or len(text) == size:
        raise _failure(f"the pod has more than {MAX_PROCESSES} processes")
    return found


def _failure(problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.RELOAD_FAILED, Fault("volumeAttributes.reload", problem, hint))
