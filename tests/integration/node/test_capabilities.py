"""The driver works with the two capabilities that it keeps, and not with fewer."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from csi_driver.host.capabilities import CAP_CHOWN, CAP_SYS_ADMIN, NEEDED
from tests.integration.node.world import running_node
from tests.support.waiting import until

SOON = timedelta(seconds=0.2)


def status(thread: Path) -> dict[str, str]:
    lines = (thread / "status").read_text(encoding="ascii").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.mark.root
async def test_driver_needs_two_capabilities() -> None:
    """Each thread has them and no others, while volumes with a group are published, renewed, restored and removed."""
    assert NEEDED == 1 << CAP_CHOWN | 1 << CAP_SYS_ADMIN == 0x200001
    async with running_node() as node:
        node.script.renew_after = SOON
        request = await node.published(attributes={"fs-group": "4711"})
        first = node.shown(request).serial
        await until(lambda: node.shown(request).serial != first, "the renewal")
        assert (node.target(request, "site.key").stat().st_gid, node.target(request).is_mount()) == (4711, True)
        await node.restart()
        assert node.target(request, "site.key").exists()
        pid = node.driver.pid
        for thread in Path(f"/proc/{pid}/task").iterdir():  # noqa: ASYNC240  # procfs does not block
            found = status(thread)
            assert {int(found[kind], 16) for kind in ("CapEff", "CapPrm")} == {NEEDED}
            assert {int(found[kind], 16) for kind in ("CapInh", "CapAmb")} == {0}
            assert found["NoNewPrivs"] == "1"
        await node.unpublish(request)
        assert not node.target(request).exists()


PROGRAM = """
import os, subprocess, sys
from csi_driver.host.capabilities import drop_capabilities
drop_capabilities()
drop_capabilities()  # again, as nothing is left to drop
print(open("/proc/self/status").read())
sys.stdout.flush()
print(subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout)
"""


@pytest.mark.root
def test_no_program_gets_other_capabilities() -> None:
    """Not even as root, whose programs normally get all."""
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    effective = [int(line.split()[1], 16) for line in output.splitlines() if line.startswith("CapEff")]
    assert effective[0] == NEEDED
    assert effective[1] & ~NEEDED == 0


def test_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from csi_driver.host import capabilities

    class Rejecting:
        @staticmethod
        def capget(*_: object) -> int:
            ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(capabilities, "_libc", Rejecting)
    with pytest.raises(PermissionError, match="Operation not permitted"):
        capabilities.drop_capabilities()
