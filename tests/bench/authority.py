"""Measures certificates per second on one core: certmount's authority and step-ca in alternation, with the same load generator."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.bench.authority_input import NODES, make_pods, write_certmount, write_step_ca
from tests.bench.authority_peers import LoadResult, Peer, build_load_generator, certmount, find_step_ca, step_ca
from tests.bench.machine import rss_mb
from tests.bench.table import Figure, spread
from tests.support.tokens import TokenIssuer

_CONCURRENCIES = (8, 32, 128)
_ROUNDS = 3
_NEW_CONNECTIONS = 32
_WARM_UP = 500
_BUDGET = 1.5


@dataclass(slots=True)
class _Side:
    peer: Peer
    loads: dict[int, list[LoadResult]] = field(default_factory=lambda: {count: [] for count in _CONCURRENCIES})

    def best(self) -> int:
        """The concurrency with the highest throughput."""
        return max(_CONCURRENCIES, key=lambda count: median(load.a_second for load in self.loads[count]))


async def measure_authority(directory: Path) -> list[Figure]:
    """Compare throughput, latency and memory. Needs Go and step-ca."""
    program, peer_program = await build_load_generator(), find_step_ca()
    if program is None or peer_program is None:
        print("authority: skipped; needs Go for the load generator, and step-ca (make peers)")
        return []
    pods, issuer = make_pods(), TokenIssuer()
    async with AsyncExitStack() as stack:
        ours = _Side(await stack.enter_async_context(certmount(directory / "certmount", issuer)))
        peer, provisioner = await stack.enter_async_context(step_ca(peer_program, directory / "step-ca"))
        theirs, fresh = _Side(peer), list[LoadResult]()
        for turn in range(_ROUNDS):
            for workers in _CONCURRENCIES:
                # step-ca accepts each token once; token IDs contain this name.
                file = directory / f"requests-{turn}-{workers}"
                write_certmount(file, pods, issuer)
                ours.loads[workers].append(await ours.peer.load(program, file, workers, _WARM_UP))
                write_step_ca(file, pods, provisioner)
                theirs.loads[workers].append(await theirs.peer.load(program, file, workers, _WARM_UP))
                file.unlink()
            file = directory / f"requests-{turn}-fresh"
            write_step_ca(file, pods, provisioner)
            fresh.append(await theirs.peer.load(program, file, _NEW_CONNECTIONS, _WARM_UP, "-fresh"))
        return _figures(ours, theirs, fresh, len(pods))


def _figures(ours: _Side, theirs: _Side, fresh: list[LoadResult], pods: int) -> list[Figure]:
    best, other = ours.best(), theirs.best()
    mine, peers = ours.loads[best], theirs.loads[other]
    ratio = median(load.a_second for load in mine) / median(load.a_second for load in peers)
    processor = median(load.server_us for load in peers) / median(load.server_us for load in mine)
    busiest = max(load.generator_share for side in (ours, theirs) for loads in side.loads.values() for load in loads)
    table = "; ".join(
        f"{count} at once: {_shown(ours.loads[count])} against {_shown(theirs.loads[count])}"
        for count in _CONCURRENCIES
    )
    method = (
        f"each side's best of {', '.join(map(str, _CONCURRENCIES))} concurrent connections, {_ROUNDS} alternating rounds "
        f"of {pods - _WARM_UP} requests. {table}. CPU time: {_us(mine)} against {_us(peers)} us per certificate, which is valid "
        f"on a busy machine too. With a new connection for each request to step-ca, as its command line does: {_rate(fresh)}/s "
        f"and {_us(fresh)} us, {_NEW_CONNECTIONS} at once. The generator used at most {busiest:.0%} of its own core. "
        f"Tokens of {pods} pods on {NODES} nodes, each pod once per round; in-process TokenReviews take 5 ms"
    )
    first = _CONCURRENCIES[0]
    return [
        Figure(
            "authority: certificates a second on one core",
            f"{_rate(mine)}: {ratio:.2f} x step-ca, {processor:.2f} x by processor time",
            f"{_BUDGET} x step-ca",
            min(ratio, processor) >= _BUDGET,
            f"step-ca 0.30.2: {_rate(peers)} a second",
            method,
        ),
        Figure(
            f"authority: time of a call, {first} at once",
            _times(ours.loads[first]),
            reference=f"step-ca {_times(theirs.loads[first])}",
            method="measured by the load generator, including the 5 ms of the TokenReview, which step-ca does not need",
        ),
        Figure(
            "authority: RSS after the run",
            f"{rss_mb(ours.peer.pid):.0f} MB",
            reference=f"step-ca {rss_mb(theirs.peer.pid):.0f} MB",
            method="VmRSS in 10^6 bytes",
        ),
    ]


def _rate(loads: list[LoadResult]) -> str:
    return spread([load.a_second for load in loads], 0)


def _us(loads: list[LoadResult]) -> str:
    return spread([load.server_us for load in loads], 0)


def _times(loads: list[LoadResult]) -> str:
    return f"p50 {median(load.p50_ms for load in loads):.1f} ms, p99 {median(load.p99_ms for load in loads):.1f} ms"


def _shown(loads: list[LoadResult]) -> str:
    return f"{_rate(loads)}/s, {_times(loads)}"
