"""Clock steps of certmount's processes: a library that is preloaded into their containers adds an offset to the real-time clock."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e import cluster

_SOURCE = Path(__file__).parent / "clock.c"
_WORKLOADS = {"certmount-node": "daemonset/certmount-node", "certmount-authority": "deployment/certmount-authority"}
_CONTAINERS = {"certmount-node": "node", "certmount-authority": "authority"}


class Clock:
    """The offsets of the components, each in a file that its containers map."""

    def __init__(self) -> None:
        self.directory = Path(os.environ["LOCALKUBE_RUN"]) / "chaos"

    def install(self) -> None:
        """Build the library, and replace the pods of certmount by pods that load it."""
        self.directory.mkdir(exist_ok=True)
        compiler = ("cc", "-O2", "-fPIC", "-shared", "-o")
        subprocess.run([*compiler, self.directory / "clock.so", _SOURCE], check=True)
        for component, workload in _WORKLOADS.items():
            self._write(component, 0)
            patch = json.dumps({"spec": {"template": {"spec": self._spec(component)}}})
            cluster.kubectl("-n", cluster.CERTMOUNT, "patch", workload, "--type=strategic", "-p", patch)
        cluster.wait_for_rollout(*_WORKLOADS.values(), seconds=180)

    def _spec(self, component: str) -> dict[str, object]:
        environment = {"LD_PRELOAD": "/chaos/clock.so", "CHAOS_CLOCK": f"/chaos/{component}"}
        container = {
            "name": _CONTAINERS[component],
            "env": [{"name": name, "value": value} for name, value in environment.items()],
            "volumeMounts": [{"name": "chaos", "mountPath": "/chaos", "readOnly": True}],
        }
        volume = {"name": "chaos", "hostPath": {"path": str(self.directory), "type": "Directory"}}
        return {"containers": [container], "volumes": [volume]}

    @contextmanager
    def stepped(self, component: str, seconds: int) -> Iterator[None]:
        """Step the clock of all processes of a component, and back at the end."""
        self._write(component, seconds)
        try:
            yield
        finally:
            self._write(component, 0)

    def _write(self, component: str, seconds: int) -> None:
        path = self.directory / component
        path.touch(mode=0o644)
        with path.open("r+b") as file:  # the same file, because the processes have mapped it
            file.write(struct.pack("q", seconds))
