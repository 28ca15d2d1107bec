"""Measures publish calls: sequential, concurrent, and repeated for an existing volume."""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import median

from tests.bench.kubelet_client import build_kubelet_client
from tests.bench.table import Figure, percentile, spread
from tests.bench.world import ISSUER_DELAY_MS, MOUNTS, PublishRequest, World, WrongResultError
from tests.support.machine import cpu_s

_ROUNDS, _VOLUMES = 4, 100
_P50_MS, _P99_MS = 4, 10
_AT_ONCE, _BURSTS, _BURST_S = 70, 7, 0.2
_BATCHES, _BATCH, _SPACING_S = 60, 20, 0.01


async def measure_publish(world: World) -> list[Figure]:
    """Publish new volumes one after another; subtract the authority's own time of each call."""
    if (client := await build_kubelet_client(world.directory, world.node.kubelet)) is None:
        print("publish: skipped; needs Go for the client")
        return []
    beyond, seen, idle = (list[float]() for _ in range(3))
    before, work = world.node.call_seconds("NodePublishVolume"), 0.0
    for _ in range(_ROUNDS):
        await world.issuer.handled()
        requests = [world.request() for _ in range(_VOLUMES)]
        work -= cpu_s(world.node.pid)
        published = (await client.run(requests, unpublish=False)).succeeded().publish_s
        work += cpu_s(world.node.pid)
        issuer = await world.issuer.handled()
        if len(issuer) != _VOLUMES:
            raise WrongResultError(f"{_VOLUMES} publishes made {len(issuer)} calls of Issue")
        for request in requests:
            world.check_files(request)
        idle += [await world.pause_and_call(ISSUER_DELAY_MS / 1000) * 1000 for _ in range(_VOLUMES)]
        await world.unpublish(requests)
        seen += published
        beyond += [(whole - its) * 1000 for whole, its in zip(published, issuer, strict=True)]
    after = world.node.call_seconds("NodePublishVolume")
    own = (after[1] - before[1]) / (after[0] - before[0]) * 1000
    p50, p99 = percentile(beyond, 0.5), percentile(beyond, 0.99)
    count = _ROUNDS * _VOLUMES
    return [
        Figure(
            f"publish, issuer answering in {ISSUER_DELAY_MS} ms: beyond the issuer's time",
            f"p50 {p50:.2f} ms, p99 {p99:.2f} ms",
            f"p50 {_P50_MS} ms, p99 {_P99_MS} ms",
            p50 <= _P50_MS and p99 <= _P99_MS,
            "cert-manager csi-driver 60-274 ms in all",
            f"{count} publishes of new volumes (EC-P256) one after another, {_VOLUMES} on the node at a time, {MOUNTS} mounts; "
            f"the time of a client in Go on an open connection less the authority's own time for the same call. In all p50 "
            f"{percentile(seen, 0.5) * 1000:.2f} ms; the mean of the driver's histogram is {own:.2f} ms, including the issuer; "
            f"{work / count * 1000:.2f} ms of the driver's CPU time each. For comparison on this machine at that time: an empty "
            f"call of a client in Python after a pause of {ISSUER_DELAY_MS} ms takes p50 {percentile(idle, 0.5):.2f} ms, p99 "
            f"{percentile(idle, 0.99):.2f} ms",
        )
    ]


async def measure_burst(world: World) -> list[Figure]:
    """Publish many volumes concurrently, as after a node restart."""
    if (client := await build_kubelet_client(world.directory, world.node.kubelet)) is None:
        print("burst: skipped; needs Go for the client")
        return []
    walls = []
    for _ in range(_BURSTS):
        requests = [world.request() for _ in range(_AT_ONCE)]
        await world.issuer.handled()
        burst = await client.run(requests, "-fresh", f"-workers={_AT_ONCE}", unpublish=False)
        walls.append(burst.succeeded().seconds)
        if len(await world.issuer.handled()) != _AT_ONCE:
            raise WrongResultError("a burst did not issue exactly one certificate per volume")
        for request in requests:
            world.check_files(request)
        await world.unpublish(requests)
    return [
        Figure(
            f"{_AT_ONCE} volumes published at once",
            f"{spread(walls, 3)} s",
            f"{_BURST_S} s",
            median(walls) < _BURST_S,
            "cert-manager csi-driver, default settings: 12.07 s",
            f"{_BURSTS} rounds, EC-P256, default settings, the issuer answering in {ISSUER_DELAY_MS} ms; a client in Go with a "
            "connection for each call, like the kubelet, until the last response. Client and authority share the CPUs",
        )
    ]


async def measure_republish(world: World) -> list[Figure]:
    """Republish a healthy volume, which the kubelet does every 60 to 90 s."""
    request = world.request()
    await world.publish(request)
    await world.publish(request)
    await world.issuer.handled()
    before, log_before = _state_of(world, request), world.node.log.stat().st_size
    own, seen = list[float](), list[float]()
    calls, total = world.node.call_seconds("NodePublishVolume")
    for _ in range(_BATCHES):
        seen += [await _spaced(world, request) * 1000 for _ in range(_BATCH)]
        now_calls, now_total = world.node.call_seconds("NodePublishVolume")
        if now_calls - calls != _BATCH:
            raise WrongResultError(f"{now_calls - calls} publishes were counted in place of {_BATCH}")
        own.append((now_total - total) / _BATCH * 1000)
        calls, total = now_calls, now_total
    issued = len(await world.issuer.handled())
    if issued or _state_of(world, request) != before or world.node.log.stat().st_size != log_before:
        raise WrongResultError(f"republishing was not free: {issued} certificates issued, or something was written")
    await world.unpublish_all()
    return [
        Figure(
            "republish of a healthy volume: driver's time",
            f"p50 {median(own):.3f} ms",
            "1 ms",
            median(own) < 1,
            "-",
            f"median of {_BATCHES} batches of {_BATCH}, a call every {_SPACING_S * 1000:.0f} ms, by the sum and count of certmount_node_call_duration_seconds. The client sees p50 "
            f"{percentile(seen, 0.5):.2f} ms, p99 {percentile(seen, 0.99):.2f} ms. Checked: 0 calls of Issue; no inode, time or link of "
            "the volume and no byte of the log changed",
        )
    ]


async def _spaced(world: World, request: PublishRequest) -> float:
    """Republish after a pause: calls of a namespace that come faster wait until the driver is idle."""
    await asyncio.sleep(_SPACING_S)
    return await world.publish(request)


def _state_of(world: World, request: PublishRequest) -> list[tuple[str, int, int, int]]:
    """Return what a write in the driver's directory would change."""
    volume = world.node.kubelet.socket.parent / "volumes" / request.volume_id
    paths = sorted([volume, volume.parent, *volume.rglob("*"), Path(request.target_path).parent])
    stats = [(str(path), path.lstat()) for path in paths]
    return [(name, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
