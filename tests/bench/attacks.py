"""Measures the publish calls of a tenant while another tenant attacks its node, and on the quiet node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from csi_driver.node.csi.service import MAX_CALLS
from tests.bench.kubelet_client import ClientResult, KubeletClient, build_kubelet_client
from tests.bench.table import Figure, percentile, spread
from tests.bench.world import Issuer, PublishRequest, World, driving
from tests.integration.node.flood import ATTRIBUTES
from tests.support.kubelet import FakePod
from tests.support.machine import cpu_s, peak_mb, wait_until_idle

_ROUNDS = 5
_VICTIMS = 100
_INTERVAL_MS = 50
_MANY = MAX_CALLS - 50  # the victim needs connections, too
_BURSTS = (
    ("valid volumes", 110),
    ("valid volumes", _MANY),
    ("invalid volumes", _MANY),
    ("large invalid volumes", _MANY),
)
"""110: one volume for each pod of a full node."""
_KEYS = 60


@dataclass(slots=True)
class _Measured:
    quiet: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    quiet_p99: list[float] = field(default_factory=list)
    attacked_p99: list[float] = field(default_factory=list)
    attack_s: list[float] = field(default_factory=list)
    work_s: list[float] = field(default_factory=list)

    def add(self, quiet: ClientResult, attacked: ClientResult) -> None:
        self.quiet += quiet.publish_s
        self.attacked += attacked.publish_s
        self.quiet_p99.append(percentile(quiet.publish_s, 0.99))
        self.attacked_p99.append(percentile(attacked.publish_s, 0.99))


async def measure_attacks(directory: Path, issuer: Issuer) -> list[Figure]:
    """Alternate quiet rounds and rounds with an attack. Needs Go."""
    figures = []
    async with driving(directory / "attacked", issuer) as world:
        client = await build_kubelet_client(directory, world.node.kubelet)
        if client is None:
            print("attacks: skipped; needs Go")
            return []
        await _victim(world, client)  # warm up
        for kind, number in _BURSTS:
            measured = _Measured()
            for _ in range(_ROUNDS):
                quiet = await _victim(world, client)
                measured.add(quiet, await _beside_burst(world, client, kind, number, measured))
            figures.append(_figure(f"{number} {kind} of a namespace at once", measured, world))
        measured = _Measured()
        for _ in range(_ROUNDS):
            quiet = await _victim(world, client)
            measured.add(quiet, await _beside_keys(world, client, measured))
        figures.append(_figure(f"{_KEYS} volumes of a namespace with RSA-4096 keys at once", measured, world))
    return figures


def _victims(world: World) -> Sequence[PublishRequest]:
    return [world.node.kubelet.publish_request(FakePod(namespace="victim", name=f"shop-{n}")) for n in range(_VICTIMS)]


def _attackers(world: World, number: int, attributes: dict[str, str]) -> Sequence[PublishRequest]:
    pods = [FakePod(namespace="attacker", name=f"pod-{pod}", service_account="flood") for pod in range(50)]
    return [
        world.node.kubelet.publish_request(pods[n % 50], attributes, volume_id=f"csi-flood-{n}") for n in range(number)
    ]


async def _victim(world: World, client: KubeletClient) -> ClientResult:
    return (await client.run(_victims(world), "-fresh", f"-every={_INTERVAL_MS}ms")).succeeded()


async def _beside_burst(
    world: World, client: KubeletClient, kind: str, number: int, measured: _Measured
) -> ClientResult:
    requests, victims = _attackers(world, number, ATTRIBUTES[kind]), _victims(world)
    before = cpu_s(world.node.pid)
    async with client.started(victims, "-fresh", f"-every={_INTERVAL_MS}ms", "-until-closed") as victim:
        flood = await client.run(requests, "-fresh", f"-workers={number}", unpublish=False)
        result = (await victim.result()).succeeded()
    measured.attack_s.append(flood.seconds)
    measured.work_s.append(cpu_s(world.node.pid) - before)
    await _remove(world, requests)
    return result


async def _beside_keys(world: World, client: KubeletClient, measured: _Measured) -> ClientResult:
    requests = _attackers(world, _KEYS, {"key-type": "RSA-4096"})
    before = cpu_s(world.node.pid)
    async with client.started(requests, "-fresh", f"-workers={_KEYS}", unpublish=False):
        result = await _victim(world, client)
        measured.attack_s.append(result.seconds)
        measured.work_s.append(cpu_s(world.node.pid) - before)
    await _remove(world, requests)
    return result


async def _remove(world: World, requests: Sequence[PublishRequest]) -> None:
    await wait_until_idle(world.node.pid)
    await world.unpublish(requests)
    await wait_until_idle(world.node.pid)


def _figure(name: str, measured: _Measured, world: World) -> Figure:
    quiet, attacked = measured.quiet, measured.attacked
    p50, p90, p99 = (
        (percentile(attacked, share) * 1000, percentile(quiet, share) * 1000) for share in (0.5, 0.9, 0.99)
    )
    ratios = [one / other for one, other in zip(measured.attacked_p99, measured.quiet_p99, strict=True)]
    return Figure(
        f"attack: {name}",
        f"p99 {median(ratios):.1f} x, p50 {p50[0] / p50[1]:.1f} x",
        "p99 2 x and 1 s",
        median(ratios) <= 2 and p99[0] < 1000,
        method=f"publishes of the victim in ms, beside the attack and quiet: p50 {_pair(p50)}, p90 {_pair(p90)}, p99 {_pair(p99)}, "
        f"slowest {_pair((max(attacked) * 1000, max(quiet) * 1000))}; {len(attacked)} beside the attack, one every {_INTERVAL_MS} ms; "
        f"p99 is the median of {_ROUNDS} alternating rounds ({spread(ratios)} x). The attack took {spread(measured.attack_s, 2)} s "
        f"and the driver {median(measured.work_s):.2f} s of CPU time; peak {peak_mb(world.node.pid):.0f} MB",
    )


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.1f} / {values[1]:.1f}"
