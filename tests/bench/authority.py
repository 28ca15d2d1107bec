"""Measures certificates per second on one core: certmount's authority and step-ca in alternation, with the same load generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.authority_input import PODS, make_pods, write_certmount, write_step_ca
from tests.bench.authority_peers import Load, LoadResult, Peer, certmount, find_step_ca, step_ca
from tests.bench.go_programs import build_go_program
from tests.bench.table import Figure, spread
from tests.support.machine import rss_mb
from tests.support.tokens import TokenIssuer

_ROUNDS = 3
_WARM_UP = 500
_BUDGET = 1.15


@dataclass(frozen=True, slots=True)
class _Way:
    """How requests are sent: the load generator's name for the caller, its options, and the loads."""

    name: str
    kind: str
    loads: tuple[Load, ...]
    options: tuple[str, ...] = ()

    @property
    def is_peer(self) -> bool:
        return self.kind == "step-ca"


_STREAM = _Way("stream, one request at a time", "stream", (Load(8), Load(32), Load(128)))
_STREAM_4 = _Way("stream, 4 requests in progress", "stream", (Load(2, 4), Load(8, 4), Load(32, 4)))
_CALLS = _Way("a call for each request", "certmount", (Load(32),))
_STEP_CA = _Way("step-ca", "step-ca", (Load(8), Load(32), Load(128)))
_FRESH = _Way("step-ca, a new connection for each request", "step-ca", (Load(32),), ("-fresh",))
_WAYS = (_STREAM, _STEP_CA, _STREAM_4, _FRESH, _CALLS)
_Results = dict[tuple[_Way, Load], list[LoadResult]]


async def measure_authority(directory: Path) -> list[Figure]:
    """Compare throughput, latency and memory. Needs Go and step-ca."""
    program, peer_program = await build_go_program("loadgen"), find_step_ca()
    if program is None or peer_program is None:
        print("authority: skipped; needs Go for the load generator, and step-ca (make peers)")
        return []
    pods, issuer = make_pods(), TokenIssuer()
    results: _Results = {(way, load): [] for way in _WAYS for load in way.loads}
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(certmount(directory / "certmount", issuer))
        theirs, provisioner = await stack.enter_async_context(step_ca(peer_program, directory / "step-ca"))
        peers = {False: ours, True: theirs}
        # A review is of a token, which has a node. So every request needs a review.
        first_node = 0
        for turn in range(_ROUNDS):
            for number, (way, load) in enumerate(_in_turn()):
                file = directory / f"requests-{turn}-{number}"
                if way.is_peer:  # step-ca accepts each token once; token IDs contain the name of the file
                    write_step_ca(file, pods, provisioner)
                else:  # new nodes, because a node has a rate limit
                    write_certmount(file, pods, issuer, range(first_node, first_node + load.connections))
                    first_node += load.connections
                results[way, load].append(
                    await peers[way.is_peer].load(program, way.kind, file, load, _WARM_UP, *way.options)
                )
        return [*_figures(results), _memory(ours, theirs)]


def _in_turn() -> Iterator[tuple[_Way, Load]]:
    """Yield all ways and their loads, so that those of certmount and of step-ca alternate."""
    for position in range(max(len(way.loads) for way in _WAYS)):
        yield from ((way, way.loads[position]) for way in _WAYS if position < len(way.loads))


def _figures(results: _Results) -> list[Figure]:
    peers = _best(results, _STEP_CA)
    busiest = max(load.generator_share for loads in results.values() for load in loads)
    method = (
        f"each side's best number of connections, {_ROUNDS} alternating rounds of {PODS - _WARM_UP} requests. The ratios are "
        f"those of the rates, and of the CPU time per certificate, which is valid on a busy machine too. "
        f"The generator used at most {busiest:.0%} of its own core. Each pod requests once per round; in-process TokenReviews "
        f"take 5 ms, which step-ca does not need"
    )
    figures = []
    for way in (_STREAM, _STREAM_4, _CALLS):
        mine = _best(results, way)
        rate = median(load.a_second for load in mine) / median(load.a_second for load in peers)
        processor = median(load.server_us for load in peers) / median(load.server_us for load in mine)
        figures.append(
            Figure(
                f"authority: certificates a second on one core; {way.name}",
                f"{rate:.2f} x step-ca, {processor:.2f} x by CPU time: {_rate(mine)}/s, {_us(mine)} us",
                f"{_BUDGET} x step-ca" if way is not _CALLS else "-",
                min(rate, processor) >= _BUDGET if way is not _CALLS else None,
                f"step-ca 0.30.2: {_rate(peers)}/s, {_us(peers)} us",
                f"{method}. {_table(results, way)}; step-ca: {_table(results, _STEP_CA)}",
            )
        )
    fresh = results[_FRESH, _FRESH.loads[0]]
    return [*figures, Figure(f"authority: {_FRESH.name}", f"{_rate(fresh)}/s, {_us(fresh)} us")]


def _best(results: _Results, way: _Way) -> list[LoadResult]:
    return max((results[way, load] for load in way.loads), key=lambda loads: median(one.a_second for one in loads))


def _table(results: _Results, way: _Way) -> str:
    return "; ".join(
        f"{load.connections} connections x {load.in_flight}: {_rate(results[way, load])}/s, {_us(results[way, load])} us, "
        f"{_times(results[way, load])}"
        for load in way.loads
    )


def _memory(ours: Peer, theirs: Peer) -> Figure:
    return Figure(
        "authority: RSS after the run",
        f"{rss_mb(ours.pid):.0f} MB",
        reference=f"step-ca {rss_mb(theirs.pid):.0f} MB",
        method="VmRSS in 10^6 bytes",
    )


def _rate(loads: Sequence[LoadResult]) -> str:
    return spread([load.a_second for load in loads], 0)


def _us(loads: Sequence[LoadResult]) -> str:
    return spread([load.server_us for load in loads], 0)


def _times(loads: Sequence[LoadResult]) -> str:
    return f"p50 {median(load.p50_ms for load in loads):.1f} ms, p99 {median(load.p99_ms for load in loads):.1f} ms"
