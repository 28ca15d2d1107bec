"""What the driver costs a node while nothing happens: memory, processor time, and its start after a crash."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from tests.bench.process import cpu_s, pss_mb, rss_mb, settle
from tests.bench.table import Figure, spread
from tests.bench.world import World, WrongResult

VOLUMES = 110
_SIDE_BY_SIDE = 10
_IDLE_S = 30.0
_LOAD_S = 60.0
_REPUBLISH_S, _STATS_S = 75.0, 60.0
"""How often a kubelet looks at each volume: with the default syncFrequency every 60-90 s, and once a minute for its usage."""
_RESTARTS = 9


def look(world: World) -> tuple[float, float]:
    """RSS and PSS in MB, after the pages of the health port were asked for once."""
    for path in ("/healthz", "/readyz", "/metrics"):
        world.node.get(path)
    return rss_mb(world.node.pid), pss_mb(world.node.pid)


async def fill(world: World) -> None:
    """Publishes all volumes, some side by side."""
    requests = [world.request() for _ in range(VOLUMES)]
    for start in range(0, VOLUMES, _SIDE_BY_SIDE):
        await world.publish_at_once(requests[start : start + _SIDE_BY_SIDE])
    for request in requests:
        world.check_files(request)


async def measure_memory(world: World) -> list[Figure]:
    """Leaves the world with all volumes published."""
    empty = look(world)
    await fill(world)
    full = look(world)
    floor = await _libraries(world)
    return [
        Figure(
            f"node RSS with 0 / {VOLUMES} volumes",
            f"{empty[0]:.1f} / {full[0]:.1f} MB",
            "50 / 54 MB",
            empty[0] <= 50 and full[0] <= 54,
            "cert-manager csi-driver 40 / 50; secrets-store 51-54 MiB",
            f"VmRSS in 10^6 bytes after /healthz, /readyz and /metrics were asked for; volumes published {_SIDE_BY_SIDE} at a time, "
            f"EC-P256. PSS {empty[1]:.1f} / {full[1]:.1f} MB",
        ),
        Figure(
            "RSS of the same libraries alone",
            f"{floor:.1f} MB",
            method="a process that imports what the driver imports of others, serves gRPC on a unix socket and has made one call over TLS",
        ),
    ]


async def _libraries(world: World) -> float:
    """The resident memory of :mod:`tests.bench.floor` in MB, at its second start."""
    arguments = [world.issuer.address, str(world.issuer.folder / "root.crt"), str(world.folder / "floor.sock")]
    command, output = [sys.executable, "-m", "tests.bench.floor", *arguments], b""
    for _ in range(2):
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, env=world.issuer.environment)
        output, _ = await process.communicate()
    return float(output)


async def measure_idle(world: World) -> list[Figure]:
    """Needs a world with all volumes published."""
    rounds = []
    await settle(world.node.pid)
    for _ in range(2):
        before = cpu_s(world.node.pid)
        await asyncio.sleep(_IDLE_S)  # the time itself is what is measured
        rounds.append((cpu_s(world.node.pid) - before) / _IDLE_S * 100)
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
            f"run time of all threads (schedstat) over {_IDLE_S:.0f} s without any call; the quieter of 2 rounds "
            f"({', '.join(f'{value:.3f}' for value in rounds)} %)",
        ),
        Figure(
            f"the same under a kubelet's calls, {VOLUMES} volumes",
            f"{loaded:.3f} % of a core",
            reference="-",
            method=f"{calls} calls spread over {_LOAD_S:.0f} s, each on a connection of its own: every volume republished every "
            f"{_REPUBLISH_S:.0f} s and its usage asked for every {_STATS_S:.0f} s; {each:.0f} us of processor time a call with its "
            f"connection, so {each * a_minute / 1e3:.0f} ms a minute for all",
        ),
    ]


async def _kubelet_load(world: World) -> tuple[float, int]:
    """Percent of a core under the calls of a kubelet in their true pace, and how many calls were made."""
    requests = list(world.published.values())
    plan = sorted(
        [(at * _REPUBLISH_S / VOLUMES, at, False) for at in range(int(VOLUMES * _LOAD_S / _REPUBLISH_S))]
        + [((at + 0.5) * _STATS_S / VOLUMES, at, True) for at in range(int(VOLUMES * _LOAD_S / _STATS_S))]
    )
    loop = asyncio.get_running_loop()
    await world.issuer.handled()
    before, began = cpu_s(world.node.pid), loop.time()
    for moment, at, stats in plan:
        await asyncio.sleep(max(0.0, began + moment - loop.time()))
        await world.kubelet_call(requests[at % VOLUMES], stats=stats)
    await asyncio.sleep(max(0.0, began + _LOAD_S - loop.time()))
    load = (cpu_s(world.node.pid) - before) / (loop.time() - began) * 100
    if await world.issuer.handled():
        raise WrongResult("certificates were issued while the kubelet only looked after its volumes")
    return load, len(plan)


async def measure_restart(world: World, empty: World) -> list[Figure]:
    """Kills both drivers, one with all volumes and one with none, and starts them by turns."""
    held = _certificates(world)
    await world.issuer.handled()
    clock: dict[World, list[float]] = {empty: [], world: []}
    work: dict[World, list[float]] = {empty: [], world: []}
    for _ in range(_RESTARTS):
        for one in (empty, world):
            clock[one].append(await one.restart() * 1000)
            work[one].append(cpu_s(one.node.pid) * 1000)
            await settle(one.node.pid)
    again = await world.publish_at_once(list(world.published.values()))
    issued = len(await world.issuer.handled())
    if issued or _certificates(world) != held:
        raise WrongResult(f"the restarts re-issued certificates ({issued})")
    beyond, worked = (median(spent[world]) - median(spent[empty]) for spent in (clock, work))
    return [
        Figure(
            f"restart with {VOLUMES} volumes, beyond the start with none",
            f"{beyond:.0f} ms, 0 re-issued",
            "150 ms, 0 re-issued",
            beyond <= 150,
            "cert-manager csi-driver 120-140 ms",
            f"SIGKILL, then from the process's start to its first answer on the CSI socket; medians of {_RESTARTS} rounds by turns: with none "
            f"{spread(clock[empty], 0)} ms, with {VOLUMES} {spread(clock[world], 0)} ms; {worked:.0f} ms more of processor time. The republish of all {VOLUMES} at once then took "
            f"{again * 1000:.0f} ms; every file is the same as before",
        )
    ]


def _certificates(world: World) -> Mapping[str, str]:
    return {
        request.volume_id: hashlib.sha256((Path(request.target_path) / "site.pem").read_bytes()).hexdigest()
        for request in world.published.values()
    }
