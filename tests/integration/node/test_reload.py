"""Reload signals of a real driver to real processes in cgroups and process ID namespaces, with hostile neighbours."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from csi_driver._proto.authority_pb2 import CONDITION_RELOAD_FAILED
from csi_driver.host.capabilities import CAP_KILL, NEEDED
from tests.integration.node.world import Node, running_node
from tests.support.call_failures import failure_of
from tests.support.kubelet import FakePod
from tests.support.requirements import missing, require_root
from tests.support.scripted_authority import TestCA
from tests.support.waiting import until

pytestmark = pytest.mark.root
SOON = timedelta(seconds=0.3)
RELOAD = {"reload": "signal=HUP,process=nginx"}
UNPRIVILEGED = 65534

# It sets its name, counts signals in a file, and has a child with the same name like the workers of a server.
PROGRAM = """
import os, signal, sys
name, log = sys.argv[1:]
def record(number, _frame):
    with open(log, "a") as file:
        print(signal.Signals(number).name, os.getpid() == main, file=file)
main = os.getpid()
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, record)
with open("/proc/self/comm", "wb") as file:
    file.write(name.encode("latin1"))
child = os.fork()
if child:
    with open(log + ".ready", "w"):
        pass
while True:
    signal.pause()
"""


class Containers:
    """Starts containers: processes in a cgroup of a pod and in other namespaces than the host."""

    def __init__(self, cgroups: Path, directory: Path) -> None:
        self.cgroups, self.directory = cgroups, directory
        self._started: list[subprocess.Popen[bytes]] = []

    async def start(self, cgroup: str, name: str = "nginx", *, host: bool = False) -> Path:
        """Start a process and return the log of its signals. ``host`` gives it the host's process IDs."""
        group = self.cgroups / cgroup
        group.mkdir(parents=True, exist_ok=True)
        log = self.directory / f"{len(self._started)}.log"
        program = [sys.executable, "-c", PROGRAM, name, str(log)]
        drop = ["setpriv", f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"]
        command = [*drop, *program] if host else ["unshare", "--pid", "--fork", "--kill-child", *drop, *program]

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        self._started.append(subprocess.Popen(command, preexec_fn=enter))  # noqa: PLW1509, ASYNC220  # no threads use locks here
        await until(Path(f"{log}.ready").exists, "the process")
        return log

    def stop(self) -> None:
        for path, _, _ in os.walk(self.cgroups):
            for pid in (Path(path) / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
        for process in self._started:
            process.wait(10)


def _version_2() -> Path:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    found = next((Path(path) for _, path, kind, options, *_ in mounts if kind == "cgroup2" and "rw" in options), None)
    if found is None:
        missing("needs a writable cgroup2 file system")
    return found


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    require_root()
    cgroups = _version_2() / f"certmount-test-{uuid.uuid4().hex}"
    cgroups.mkdir()
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(0o777)  # an unprivileged process writes its log here
    containers = Containers(cgroups, tmp_path)
    try:
        yield containers
    finally:
        containers.stop()
        deadline = time.monotonic() + 10
        for path, _, _ in os.walk(cgroups, topdown=False):
            while Path(path).exists():
                assert time.monotonic() < deadline, f"{path} is in use"
                with contextlib.suppress(OSError):  # busy until the kernel has removed the processes
                    Path(path).rmdir()


@contextlib.asynccontextmanager
async def _node(containers: Containers, namespaces: str = "web") -> AsyncIterator[Node]:
    options = [f"--reload-namespaces={namespaces}", f"--cgroups={containers.cgroups}"]
    async with running_node(options=options) as node:
        node.script.renew_after = SOON
        yield node


def _signals(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


async def test_only_the_main_process_of_the_pod_gets_the_signal(containers: Containers) -> None:
    """Neighbours use the name, the pod's UID in names of cgroups, and the namespaces of the host."""
    pod, other = FakePod(), FakePod(name="attacker")
    mine = await containers.start(f"kubepods/burstable/pod{pod.uid}/c1")
    names = ["nginx)", "(nginx) S 1", "nginx\nNSpid:\t1"]
    others = [
        await containers.start(f"kubepods/burstable/pod{other.uid}/c1"),
        await containers.start(f"kubepods/burstable/pod{other.uid}/c1/pod{pod.uid}"),
        await containers.start(f"kubepods/burstable/pod{other.uid}/c1/kubepods/pod{pod.uid}/c1"),
        await containers.start("system.slice/nginx.service", host=True),
        await containers.start(f"kubepods/burstable/pod{pod.uid}/c1", host=True),  # such as a container runtime
        *[await containers.start(f"kubepods/burstable/pod{pod.uid}/c2", name) for name in names],
    ]
    async with _node(containers) as node:
        request = await node.published(pod, RELOAD)
        serial = node.shown(request).serial
        await until(lambda: len(_signals(mine)) >= 2, "two signals", 60)
        assert set(_signals(mine)) == {"SIGHUP True"}  # none of its children
        assert node.shown(request).serial != serial
        assert [_signals(log) for log in others] == [[]] * len(others)
        assert {event["processes"] for event in node.driver.events("reload signal sent")} == {1}
        await until(lambda: node.metric("certmount_node_reload_signals_total", result="sent") >= 2, "the metric")
        assert not node.authority.reports
        status = Path(f"/proc/{node.driver.pid}/status").read_text()  # noqa: ASYNC240  # procfs does not block
        assert f"CapEff:\t{NEEDED | 1 << CAP_KILL:016x}\n" in status


async def test_new_roots_cause_a_signal(containers: Containers) -> None:
    pod = FakePod()
    mine = await containers.start(f"kubepods.slice/kubepods-pod{pod.uid.replace('-', '_')}.slice/c1.scope")
    async with _node(containers) as node:
        node.script.renew_after = None
        request = await node.published(pod, {"reload": "signal=USR2,process=nginx"})
        await node.watched()
        assert _signals(mine) == []
        before = node.shown(request).roots
        await node.authority.trust(node.authority.ca.der, TestCA("new root").der)
        await until(lambda: node.shown(request).roots != before, "the new roots")
        await until(lambda: _signals(mine), "the signal")
        assert _signals(mine) == ["SIGUSR2 True"]


async def test_failed_signal_is_reported_once_and_the_files_are_renewed(containers: Containers) -> None:
    pod = FakePod()
    await containers.start(f"kubepods/pod{pod.uid}/c1", "envoy")
    async with _node(containers, "*") as node:
        request = await node.published(pod, RELOAD)
        await until(lambda: node.authority.reports, "the report")
        report = node.authority.reports[0]
        assert (report.condition, report.reason) == (CONDITION_RELOAD_FAILED, "ReloadFailed")
        assert report.message == (
            "the files were replaced, but the signal failed: ReloadFailed: volumeAttributes.reload: no process in the "
            "containers of the pod has the name nginx; run: kubectl exec POD -- cat /proc/1/comm"
        )
        serial = node.shown(request).serial
        await until(lambda: node.shown(request).serial != serial, "the next renewal")
        await until(lambda: node.metric("certmount_node_reload_signals_total", result="failed") >= 1, "the metric")


@pytest.mark.parametrize("namespaces", ["", "shop,webb"])
async def test_namespace_that_is_not_allowed(containers: Containers, namespaces: str) -> None:
    async with _node(containers, namespaces) as node:
        failure = await failure_of(node.publish(node.request(attributes=RELOAD)))
        assert failure.text == (
            "ReloadNotAllowed: volumeAttributes.reload: signals are not allowed in namespace web; remove it, or ask an "
            "administrator to add the namespace to deploy/components/reload or to the Helm value reload.namespaces"
        )
        await node.published()
