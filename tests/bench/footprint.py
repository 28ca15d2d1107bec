"""Measures the driver's memory, its idle CPU time, and its start after a crash."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from tests.bench.table import Figure, spread
from tests.bench.world import World, WrongResultError
from tests.support.machine import cpu_s, pss_mb, rss_mb, wait_until_idle

VOLUMES = 110
_CONCURRENCY = 10
_IDLE_S = 30.0
_LOAD_S = 60.0
# The intervals of the kubelet's calls per volume: republish (60-90 s by the default syncFrequency) and volume stats.
_REPUBLISH_S, _STATS_S = 75.0, 60.0
_RESTARTS = 9


def memory(world: World) -> tuple[float, float]:
    """Return RSS and PSS in MB, after one request of each HTTP path."""
    for path in ("/healthz", "/readyz", "/metrics"):
        world.node.get(path)
    return rss_mb(world.node.pid), pss_mb(world.node.pid)


async def fill(world: World) -> None:
    """Publish all volumes, some of them concurrently."""
    requests = [world.request() for _ in range(VOLUMES)]
    for start in range(0, VOLUMES, _CONCURRENCY):
        await world.publish_at_once(requests[start : start + _CONCURRENCY])
    for request in requests:
        world.check_files(request)


async def measure_memory(world: World) -> list[Figure]:
    """Measure the memory; leaves all volumes published."""
    empty = memory(world)
    await fill(world)
    full = memory(world)
    floor = await _libraries(world)
    return [
        Figure(
            f"node RSS with 0 / {VOLUMES} volumes",
            f"{empty[0]:.1f} / {full[0]:.1f} MB",
            "54 / 58 MB",
            empty[0] <= 54 and full[0] <= 58,
            "cert-manager csi-driver 40 / 50; secrets-store 51-54 MiB",
            f"VmRSS in 10^6 bytes after /healthz, /readyz and /metrics were requested; volumes published {_CONCURRENCY} at a time, "
            f"EC-P256. PSS {empty[1]:.1f} / {full[1]:.1f} MB",
        ),
        Figure(
            "RSS of the same libraries alone",
            f"{floor:.1f} MB",
            method="a process with the driver's third-party imports that serves gRPC on a Unix socket and has made one call over TLS",
        ),
    ]


async def _libraries(world: World) -> float:
    """Return the resident memory of :mod:`tests.bench.floor` in MB, at its second start."""
    arguments = [world.issuer.address, str(world.issuer.directory / "root.crt"), str(world.directory / "floor.sock")]
    command, pipe, output = [sys.executable, "-m", "tests.bench.floor", *arguments], asyncio.subprocess.PIPE, b""
    for _ in range(2):
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, env=world.issuer.environment)
        output, _ = await process.communicate()
    return float(output)


async def measure_idle(world: World) -> list[Figure]:
    """Measure the idle CPU time with all volumes published."""
    rounds, pid = [], world.node.pid
    await wait_until_idle(pid)
    for _ in range(2):
        before = cpu_s(pid)
        await asyncio.sleep(_IDLE_S)  # this time is measured
        rounds.append((cpu_s(pid) - before) / _IDLE_S * 100)
    loaded, calls = await _kubelet_load(world)
    idle = min(rounds)
    each = (loaded - idle) / 100 * _LOAD_S / calls * 1e6
    a_minute = VOLUMES * (60 / _REPUBLISH_S + 60 / _STATS_S)
    return [
        Figure(
            f"node idle CPU, {VOLUMES} volumes",
            f"{idle:.3f} % of a core",
            "0.1 %",
            idle < 0.1,
            "cert-manager csi-driver 2.2-2.6 %",
            f"run time of all threads (schedstat) over {_IDLE_S:.0f} s without calls; the lower of 2 rounds "
            f"({', '.join(f'{value:.3f}' for value in rounds)} %)",
        ),
        Figure(
            f"the same under a kubelet's calls, {VOLUMES} volumes",
            f"{loaded:.3f} % of a core",
            reference="-",
            method=f"{calls} calls spread over {_LOAD_S:.0f} s, each on its own connection: each volume republished every "
            f"{_REPUBLISH_S:.0f} s and its stats queried every {_STATS_S:.0f} s; {each:.0f} us of CPU time per call with its "
            f"connection, so {each * a_minute / 1e3:.0f} ms per minute for all volumes",
        ),
    ]


async def _kubelet_load(world: World) -> tuple[float, int]:
    """Return the CPU use in percent of a core under a kubelet's calls in real time, and the number of calls."""
    requests = list(world.published.values())
    plan = sorted(
        [(at * _REPUBLISH_S / VOLUMES, at, False) for at in range(int(VOLUMES * _LOAD_S / _REPUBLISH_S))]
        + [((at + 0.5) * _STATS_S / VOLUMES, at, True) for at in range(int(VOLUMES * _LOAD_S / _STATS_S))]
    )
    loop = asyncio.get_running_loop()
    await world.issuer.handled()
    before, began = cpu_s(world.node.pid), loop.time()
    for due, at, stats in plan:
        await asyncio.sleep(max(0.0, began + due - loop.time()))
        await world.kubelet_call(requests[at % VOLUMES], stats=stats)
    await asyncio.sleep(max(0.0, began + _LOAD_S - loop.time()))
    load = (cpu_s(world.node.pid) - before) / (loop.time() - began) * 100
    if await world.issuer.handled():
        raise WrongResultError("republish calls issued certificates")
    return load, len(plan)


async def measure_restart(world: World, empty: World) -> list[Figure]:
    """Kill and restart two drivers in alternation, one with all volumes and one without."""
    held = _certificates(world)
    await world.issuer.handled()
    clock, work = ({empty: list[float](), world: list[float]()} for _ in range(2))
    for _ in range(_RESTARTS):
        for one in (empty, world):
            clock[one].append(await one.restart() * 1000)
            work[one].append(cpu_s(one.node.pid) * 1000)
            await wait_until_idle(one.node.pid)
    again = await world.publish_at_once(list(world.published.values()))
    issued = len(await world.issuer.handled())
    if issued or _certificates(world) != held:
        raise WrongResultError(f"the restarts issued certificates again ({issued})")
    beyond, worked = (median(spent[world]) - median(spent[empty]) for spent in (clock, work))
    return [
        Figure(
            f"restart with {VOLUMES} volumes, beyond the start with none",
            f"{beyond:.0f} ms, 0 re-issued",
            "150 ms, 0 re-issued",
            beyond <= 150,
            "cert-manager csi-driver 120-140 ms",
            f"SIGKILL, then from the process's start to its first response on the CSI socket; medians of {_RESTARTS} alternating rounds: with none "
            f"{spread(clock[empty], 0)} ms, with {VOLUMES} {spread(clock[world], 0)} ms; {worked:.0f} ms more of CPU time. The concurrent republish of all {VOLUMES} then took "
            f"{again * 1000:.0f} ms; all files are unchanged",
        )
    ]


def _certificates(world: World) -> Mapping[str, str]:
    return {
        request.volume_id: hashlib.sha256((Path(request.target_path) / "site.pem").read_bytes()).hexdigest()
        for request in world.published.values()
    }
