"""Which processes get a signal, with a tree of cgroups and a /proc as tenants can make them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.reload import Reload, ReloadSignal
from csi_driver.host.pod_processes import MAX_CGROUPS, MAX_PROCESSES, MAX_SIGNALLED, PodProcesses

POD, OTHER = "81ee972f-5f4b-4ad2-84fa-e639d2548462", "f9dbfa3f-6f9f-4521-88f4-7e06fbfb025b"
NGINX = Reload(ReloadSignal.HUP, "nginx")
SHIM = 1  # the parent of the first process of a container


@dataclass
class Host:
    """A host whose kernel is a directory."""

    directory: Path
    hierarchy: str = ""
    signalled: list[tuple[int, int]] = field(default_factory=list)
    opened: dict[int, int] = field(default_factory=dict)

    @property
    def processes(self) -> PodProcesses:
        return PodProcesses(self.directory / "cgroup", self.directory / "proc")

    def cgroup(self, path: str, *pids: int) -> None:
        directory = self.directory / "cgroup" / self.hierarchy / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))

    def process(self, pid: int, name: str = "nginx", parent: int = SHIM, namespaces: str = "1") -> int:
        """Add a process. ``namespaces`` are its IDs in the namespaces below the host's; empty for a process of the host."""
        directory = self.directory / "proc" / str(pid)
        directory.mkdir(parents=True, exist_ok=True)
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")  # as the kernel does
        status = f"Name:\t{escaped}\nState:\tS (sleeping)\nPPid:\t{parent}\nNSpid:\t{pid}\t{namespaces}\n"
        (directory / "status").write_text(status)
        return pid

    def signal(self, reload: Reload = NGINX, pod: str = POD) -> list[int]:
        """Return the signalled processes."""
        assert self.processes.signal(pod, reload) == len(self.signalled)
        return [pid for pid, _ in self.signalled]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    found = Host(tmp_path)

    def pidfd_open(pid: int) -> int:
        if not (tmp_path / "proc" / str(pid)).exists():
            raise ProcessLookupError
        descriptor = os.open("/dev/null", os.O_RDONLY)
        found.opened[descriptor] = pid
        return descriptor

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    monkeypatch.setattr(
        signal,
        "pidfd_send_signal",
        lambda descriptor, number: found.signalled.append((found.opened[descriptor], number)),
    )
    yield found
    for descriptor in found.opened:  # each one is closed
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


UID_ = POD.replace("-", "_")
PATHS = [
    f"kubepods/pod{POD}/c1",
    f"kubepods/burstable/pod{POD}/c1",
    f"kubepods/besteffort/pod{POD}/c1",
    f"kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-c1.scope",
    f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/crio-c1.scope",
    f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice/docker-c1.scope",
]


@pytest.mark.parametrize("hierarchy", ["", "unified", "systemd", "pids", "memory"])
@pytest.mark.parametrize("path", PATHS)
def test_process_is_found_with_each_cgroup_driver_and_version(host: Host, hierarchy: str, path: str) -> None:
    host.hierarchy = hierarchy
    host.cgroup(str(Path(path).parent))
    host.cgroup(path, host.process(10), host.process(11, "sidecar"))
    assert host.signal() == [10]
    assert host.signalled == [(10, signal.SIGHUP)]


@pytest.mark.parametrize("wanted", ReloadSignal)
def test_each_signal(host: Host, wanted: ReloadSignal) -> None:
    host.cgroup(f"kubepods/pod{POD}", host.process(10))
    host.signal(Reload(wanted, "nginx"))
    assert [signal.Signals(number).name for _, number in host.signalled] == [f"SIG{wanted.value}"]


def test_main_process_of_each_container_gets_the_signal(host: Host) -> None:
    """Workers have the name of their main process, and a signal for it can end them."""
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(10), host.process(11, parent=10), host.process(12, parent=11))
    host.cgroup(f"kubepods/pod{POD}/c2", host.process(9, parent=20), host.process(20))
    assert sorted(host.signal()) == [10, 20]


def fails_with(host: Host, problem: str, pod: str = POD) -> None:
    with pytest.raises(CertmountError) as raised:
        host.processes.signal(pod, NGINX)
    assert raised.value.reason is Reason.RELOAD_FAILED
    assert f"volumeAttributes.reload: {problem}" in str(raised.value)
    assert not host.signalled


NONE = "no process in the containers of the pod has the name nginx"


@pytest.mark.parametrize(
    "path",
    [
        # An attacker whose container can create cgroups names them after the victim's volume, and the other way round.
        "kubepods/burstable/pod{other}/c1/pod{pod}",
        "kubepods/burstable/pod{other}/c1/kubepods/burstable/pod{pod}",
        "kubepods/burstable/pod{other}/pod{pod}",
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{other}.slice/kubepods-burstable-pod{pod}.slice",
        "kubepods/burstable/pod{pod}{other}/c1",
        "kubepods/burstable/xpod{pod}/c1",
        "system.slice/kubepods-pod{pod}.slice",
        "kubepods/guaranteed/pod{pod}",
        "pod{pod}",
    ],
)
def test_only_the_directory_of_the_kubelet_counts(host: Host, path: str) -> None:
    host.cgroup(path.format(pod=POD, other=OTHER), host.process(10))
    fails_with(host, f"{host.directory}/cgroup has no cgroup of the pod below kubepods or kubepods.slice")
    host.cgroup(f"kubepods/burstable/pod{POD}/c1", host.process(11, "other"))
    fails_with(host, NONE)


@pytest.mark.parametrize("uid", ["", "..", f"../pod{OTHER}", f"{OTHER}/c1", "*", OTHER.upper(), "x" * 36, "a" * 37])
def test_uid_is_no_path(host: Host, uid: str) -> None:
    host.cgroup(f"kubepods/pod{OTHER}/c1", host.process(10))
    fails_with(host, "the pod's UID", uid)


def test_processes_of_other_pods_and_of_the_host_get_no_signal(host: Host) -> None:
    host.cgroup("", host.process(2, namespaces=""))
    host.cgroup(f"kubepods/pod{OTHER}/c1", host.process(3))
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(4, "other"))
    fails_with(host, NONE)


def test_process_of_the_host_in_the_cgroup_of_the_pod_gets_no_signal(host: Host) -> None:
    """A container runtime, a virtual machine monitor, or the processes of a pod with hostPID."""
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(10, namespaces=""))
    fails_with(host, NONE)


@pytest.mark.parametrize("name", ["nginx\n", "nginx\nNSpid:\t10\t1", "(nginx) S 1", "nginx ", "Nginx", "nginx\\n", ""])
def test_name_is_compared_exactly(host: Host, name: str) -> None:
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(10, name))
    fails_with(host, NONE)


def test_forged_name_cannot_hide_the_namespaces(host: Host) -> None:
    """The kernel escapes line breaks in names, so a name adds no line to the status."""
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(10, "x\nName:\tnginx\nNSpid:\t1\t1\n", namespaces=""))
    fails_with(host, NONE)


def test_processes_in_nested_namespaces_and_cgroups_belong_to_the_pod(host: Host) -> None:
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(10, "dockerd"))
    host.cgroup(f"kubepods/pod{POD}/c1/inner", host.process(11, parent=10, namespaces="7\t1"))
    assert host.signal() == [11]


@pytest.mark.parametrize("change", ["name", "cgroup", "namespace", "ended"])
def test_process_that_got_the_id_of_another_gets_no_signal(
    host: Host, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The process ended after the search, and the kernel gave its ID to a process of the host or of another pod."""
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(10))
    pidfd_open = os.pidfd_open

    def reuse(pid: int) -> int:
        match change:
            case "name":
                host.process(10, "other")
            case "cgroup":
                host.cgroup(f"kubepods/pod{POD}/c1")
                host.cgroup(f"kubepods/pod{OTHER}/c1", 10)
            case "namespace":
                host.process(10, namespaces="")
            case "ended":
                (host.directory / "proc/10/status").unlink()
        return pidfd_open(pid)

    monkeypatch.setattr(os, "pidfd_open", reuse)
    fails_with(host, NONE)


def test_process_that_ends_during_the_search_is_omitted(host: Host) -> None:
    host.cgroup(f"kubepods/pod{POD}/c1", 10, host.process(11))
    assert host.signal() == [11]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])
def test_process_whose_id_is_now_that_of_a_thread_is_omitted(
    host: Host, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Processes and threads share IDs. The error depends on the version of the kernel."""
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(10), host.process(11))
    pidfd_open = os.pidfd_open

    def reuse(pid: int) -> int:
        if pid == 10:
            raise OSError(number, os.strerror(number))
        return pidfd_open(pid)

    monkeypatch.setattr(os, "pidfd_open", reuse)
    assert host.signal() == [11]


def test_kernel_refuses_to_open_a_thread_with_an_expected_error() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        with pytest.raises(OSError) as refused:  # noqa: PT011 - the text depends on the version of the kernel
            os.pidfd_open(thread.native_id or 0)
    finally:
        ended.set()
        thread.join()
    assert refused.value.errno in (errno.EINVAL, errno.ENOENT)


def test_limits(host: Host) -> None:
    host.cgroup(f"kubepods/pod{POD}/c1", *range(100_000, 100_000 + MAX_PROCESSES + 1))
    fails_with(host, f"the pod has more than {MAX_PROCESSES} processes")
    host.cgroup(f"kubepods/pod{POD}/c1", *range(1, 1_000_000))
    fails_with(host, f"the pod has more than {MAX_PROCESSES} processes")
    host.cgroup(f"kubepods/pod{POD}/c1", *(host.process(pid) for pid in range(10, 11 + MAX_SIGNALLED)))
    fails_with(host, f"{MAX_SIGNALLED + 1} processes have the name nginx")
    for number in range(MAX_CGROUPS):
        host.cgroup(f"kubepods/pod{POD}/c1/{number}")
    fails_with(host, f"the pod has more than {MAX_CGROUPS} cgroups")


def test_wide_tree_of_cgroups_takes_little_memory(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container can create many cgroups with long names below its cgroup."""
    seen: list[str] = []

    @contextlib.contextmanager
    def many(path: str) -> Iterator[Iterator[SimpleNamespace]]:
        def is_directory(**_: object) -> bool:
            seen.append(path)
            return True

        yield (SimpleNamespace(path=f"{path}/{number}", is_dir=is_directory) for number in range(1000))

    host.cgroup(f"kubepods/pod{POD}")
    monkeypatch.setattr(os, "scandir", many)
    fails_with(host, f"the pod has more than {MAX_CGROUPS} cgroups")
    assert len(seen) <= 3 * MAX_CGROUPS


def test_deep_tree_of_cgroups_is_an_error(host: Host) -> None:
    host.cgroup(f"kubepods/pod{POD}")
    directory = os.open(host.directory / f"cgroup/kubepods/pod{POD}", os.O_DIRECTORY)
    for _ in range(40):  # longer than a path can be
        os.mkdir("x" * 200, dir_fd=directory)
        deeper = os.open("x" * 200, os.O_DIRECTORY, dir_fd=directory)
        os.close(directory)
        directory = deeper
    os.close(directory)
    fails_with(host, "cannot signal the process nginx: File name too long")


def test_driver_without_the_process_ids_of_the_host(host: Host) -> None:
    """The kernel shows the ID 0 for processes outside of the reader's namespace."""
    host.cgroup(f"kubepods/pod{POD}/c1", 0)
    fails_with(host, "the driver cannot see the pod's processes; it needs deploy/components/reload")


def test_missing_permission_is_an_error(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    host.cgroup(f"kubepods/pod{POD}/c1", host.process(10))
    fails_with(host, "cannot signal the process nginx: Operation not permitted; the driver needs")


def test_uid_of_a_static_pod(host: Host) -> None:
    uid = uuid.uuid4().hex
    host.cgroup(f"kubepods/pod{uid}/c1", host.process(10))
    assert host.signal(pod=uid) == [10]
