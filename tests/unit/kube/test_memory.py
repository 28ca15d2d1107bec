"""The memory of a process that lists and watches does not depend on what tenants write into their objects."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from typing import Any

import pytest

from csi_driver.kube.object_caches import MAX_POD_BYTES
from tests.support.waiting import until
from tests.unit.kube.api_server import FakeApiServer

Fill = Callable[[FakeApiServer], None]
MAX_GROWTH_MB = 100.0
MAX_STEP_MS = 40.0  # about 5 ms; a machine that is shared with other tests needs more
NORMAL = 1000


def normal_pods(server: FakeApiServer) -> None:
    pods = server.collection("pods")
    for number in range(NORMAL):
        put_pod(pods, f"normal-{number}", "web", labels={"app": f"app-{number // 10}"})


def put_pod(pods: Any, name: str, namespace: str, **metadata: Any) -> None:
    pods.put({"metadata": {"name": name, "namespace": namespace, **metadata}})


def large_annotations(server: FakeApiServer) -> None:
    for number in range(250):
        put_pod(server.collection("pods"), f"pod-{number}", "attack", annotations={"a": "x" * 256_000})


def managed_fields(server: FakeApiServer) -> None:
    """As JSON, each would become 30 times as many bytes of Python objects."""
    fields = json.dumps({f"f:{number}": {} for number in range(100_000)}).encode()
    for number in range(60):
        put_pod(server.collection("pods"), f"pod-{number}", "attack", managedFields=[fields])


def large_labels(server: FakeApiServer) -> None:
    labels = {f"label-{number}": "x" for number in range(60_000)}
    for number in range(10):
        put_pod(server.collection("pods"), f"pod-{number}", "attack", labels=labels)
        server.collection("namespaces").put({"metadata": {"name": f"attack-{number}", "labels": labels}})
        service = {"name": f"service-{number}", "namespace": "attack"}
        server.collection("services").put({"metadata": service, "spec": {"selector": labels}})


def distinct_labels(server: FakeApiServer) -> None:
    """Each pod's labels are allowed, but together they exceed the share of the namespace."""
    for number in range(2 * MAX_POD_BYTES // 40_000):
        labels = {f"label-{number}-{one}": f"{number}-{one}" + "x" * 40 for one in range(100)}
        put_pod(server.collection("pods"), f"pod-{number}", "attack", labels=labels)


async def _report(process: Process) -> dict[str, float]:
    assert process.stdout is not None
    found: dict[str, float] = json.loads(await process.stdout.readline())
    return found


async def measure(fill: Fill, *, watched: bool) -> dict[str, float]:
    """Return what the process reports after it lists the objects, or watches while they are created."""
    server = FakeApiServer()
    normal_pods(server)
    if not watched:
        fill(server)
    async with server.running():
        command = [sys.executable, "-m", "tests.support.watching_process", server.url, "uid-web/last"]
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        try:
            report = await _report(process)
            if watched:
                await until(lambda: all(one.watching for one in server.collections.values()), "the watches")
                fill(server)
                # Events arrive in order, so the process has seen all others when it knows this pod.
                put_pod(server.collection("pods"), "last", "web")
                report = await _report(process)
            return report
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@functools.cache
def _quiet() -> dict[str, float]:
    return asyncio.run(measure(lambda _: None, watched=False))


@pytest.fixture(scope="module")
def quiet() -> dict[str, float]:
    return _quiet()


@pytest.mark.parametrize("watched", [False, True], ids=["list", "watch"])
@pytest.mark.parametrize("fill", [large_annotations, managed_fields, large_labels, distinct_labels])
def test_tenant_cannot_grow_memory_or_block_the_event_loop(fill: Fill, watched: bool, quiet: dict[str, float]) -> None:
    found = asyncio.run(measure(fill, watched=watched))
    grown = found["peak_mb"] - quiet["peak_mb"]
    print(f"{fill.__name__}: {grown:.0f} MB more than {quiet['peak_mb']:.0f} MB, {found}")
    assert found["pods"] >= NORMAL
    assert grown < MAX_GROWTH_MB, found
    assert found["step_ms"] < MAX_STEP_MS, found
