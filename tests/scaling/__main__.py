"""``python -m tests.scaling``: print the tables of docs/scaling.md, the load of 1,000 to 10,000 nodes on the authority."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.scaling.authority import Figures
from tests.scaling.scenarios import PODS, Case, Result, replicas_for, simulate

NODES = (1_000, 5_000, 10_000)
_HOUR_S = 3600.0
_LIFETIMES_S = (_HOUR_S, 24 * _HOUR_S)
_SCENARIOS = {
    "normal": "Normal operation",
    "outage": "After an outage of the authority of one hour",
    "zone": "A zone (a third of the nodes) restarts",
}
_MAX_NODES = 1_000  # nodes to simulate if each of them renews all of its certificates; larger clusters are sampled
_MEMORY_MB, _MEMORY_PER_POD_B = 130, 200


def cases(figures: Figures) -> list[Case]:
    """Return the cases of all tables, and one case exact and sampled, for comparison."""
    found = [
        Case(scenario, nodes, lifetime_s, replicas_for(nodes, lifetime_s, figures), _share(scenario, nodes, lifetime_s))
        for scenario in _SCENARIOS
        for nodes in NODES
        for lifetime_s in _LIFETIMES_S
    ]
    compared = partial(Case, "outage", 3_000, _HOUR_S, replicas_for(3_000, _HOUR_S, figures))
    return [*found, compared(1.0), compared(1 / 3)]


def _share(scenario: str, nodes: int, lifetime_s: float) -> float:
    exact = scenario == "normal" or (scenario == "outage" and lifetime_s > _HOUR_S)
    return 1.0 if exact else min(1.0, _MAX_NODES / nodes)


def main() -> None:
    parser, usual = argparse.ArgumentParser(description=__doc__), Figures()
    parser.add_argument(
        "--per-core", type=float, default=usual.issue_per_core_s, help="certificates a second of a replica"
    )
    parser.add_argument(
        "--rejection-ms", type=float, default=usual.rejection_s * 1000, help="CPU time of a rejected call"
    )
    arguments = parser.parse_args()
    figures = Figures(issue_per_core_s=arguments.per_core, rejection_s=arguments.rejection_ms / 1000)
    began = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(partial(simulate, figures=figures), cases(figures)))
    print(f"{PODS} pods per node; {figures.issue_per_core_s:.0f} certificates per second of a replica with one core")
    for scenario, title in _SCENARIOS.items():
        print(f"\n## {title}\n")
        _print(result for result in results[:-2] if result.case.scenario == scenario)
    print("\n## The same case, exact and sampled\n")
    _print(results[-2:])
    print(f"\n{sum(map(_calls, results)):,} calls simulated in {time.monotonic() - began:.0f} s")


def _calls(result: Result) -> int:
    return round((result.mean * result.seconds + result.rejected) * result.case.share)


def _print(results: Iterable[Result]) -> None:
    rows = [_row(result) for result in results]
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " ---: |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


def _row(result: Result) -> dict[str, str]:
    """Return the cells by column. A table has only the columns that apply to its scenario."""
    case = result.case
    memory_mb = _MEMORY_MB + case.nodes * PODS * _MEMORY_PER_POD_B / 1e6
    normal, outage = case.scenario == "normal", case.scenario == "outage"
    random = random_worst(result.mean * case.share, result.seconds) / (result.mean * case.share)
    later = f"{result.later_worst / result.usual:.1f}" if result.later_worst else ""
    return {
        "nodes": f"{case.nodes:,}",
        "lifetime": f"{case.lifetime_s / _HOUR_S:.0f} h",
        "simulated": "all" if case.share == 1 else f"{case.nodes * case.share:,.0f}",
        "replicas": str(case.replicas),
        **({"MB each": f"{memory_mb:.0f}"} if normal else {}),
        "certs/s mean": f"{result.mean:,.0f}" if result.mean >= 10 else f"{result.mean:.1f}",
        "worst second": f"{result.worst:,.0f}",
        "worst / mean": f"{result.worst / result.mean:.2f}",
        "random": f"{random:.2f}",
        **({} if normal else {"later worst / usual mean": later}),
        "TokenReviews/s mean": f"{result.reviews_mean:,.0f}",
        "worst": f"{result.reviews_worst:,.0f}",
        **({} if normal else {"rejected": f"{result.rejected:,}", "caught up after": f"{result.seconds:,} s"}),
        **({"expired in the outage": f"{result.expired_in:,}"} if outage else {}),
        **({"expired after it": f"{result.expired_after:,}"} if outage else {}),
    }


def random_worst(mean: float, seconds: int) -> int:
    """Return the median of the worst second if certificates arrive at random (Poisson)."""
    count, probability = 0, math.exp(-mean)
    if not probability:  # Below the smallest float, the normal distribution is a good approximation.
        return round(mean + math.sqrt(2 * mean * math.log(seconds)))
    below = probability
    while below**seconds < 0.5:
        count += 1
        probability *= mean / count
        below += probability
    return count


if __name__ == "__main__":
    main()
