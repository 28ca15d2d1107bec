"""``python -m tests.scaling``: what 1,000 to 10,000 nodes ask of the authority, as tables. See docs/scaling.md."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.scaling.authority import Figures
from tests.scaling.scenarios import PODS, Case, Result, play, replicas_for

NODES = (1_000, 5_000, 10_000)
_HOUR_S = 3600.0
LIVES_S = (_HOUR_S, 24 * _HOUR_S)
_STORIES = {
    "steady": "A day like any other",
    "outage": "After an outage of the authority of an hour",
    "zone": "A zone (a third of the nodes) starts anew",
}
_MOST_PLAYED = 1_000
"""Nodes that are played where each of them has all of its renewals in the story; more are sampled."""
_HEADS = (
    "nodes",
    "life",
    "played",
    "replicas",
    "MB each",
    "certs/s mean",
    "worst second",
    "worst / mean",
    "by chance alone",
    "later worst / usual mean",
    "TokenReviews/s mean",
    "worst",
    "refused",
    "caught up after",
    "expired in the outage",
    "after it",
)
_MEMORY_MB, _MEMORY_A_POD_B = 130, 200


def cases(figures: Figures) -> list[Case]:
    """All that the tables show, and one case played exactly and by a sample, so that the two can be compared."""
    found = [
        Case(story, nodes, life_s, replicas_for(nodes, life_s, figures), _share(story, nodes, life_s))
        for story in _STORIES
        for nodes in NODES
        for life_s in LIVES_S
    ]
    checked = partial(Case, "outage", 3_000, _HOUR_S, replicas_for(3_000, _HOUR_S, figures))
    return [*found, checked(1.0), checked(1 / 3)]


def _share(story: str, nodes: int, life_s: float) -> float:
    exact = story == "steady" or (story == "outage" and life_s > _HOUR_S)
    return 1.0 if exact else min(1.0, _MOST_PLAYED / nodes)


def main() -> None:
    """Plays everything on all cores and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--per-core", type=float, default=Figures().issue_per_core_s, help="certificates/s of a replica"
    )
    parser.add_argument("--refusal-ms", type=float, default=Figures().refuse_s * 1000, help="core time of a refusal")
    arguments = parser.parse_args()
    figures = Figures(issue_per_core_s=arguments.per_core, refuse_s=arguments.refusal_ms / 1000)
    began = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(partial(play, figures=figures), cases(figures)))
    print(f"{PODS} pods a node; a replica has one core and signs {figures.issue_per_core_s:.0f} certificates a second")
    for story, title in _STORIES.items():
        print(f"\n## {title}\n")
        _print(result for result in results[:-2] if result.case.story == story)
    print("\n## The same case exactly and by a sample\n")
    _print(results[-2:])
    print(f"\n{sum(map(_calls, results)):,} calls played in {time.monotonic() - began:.0f} s")


def _calls(result: Result) -> int:
    return round((result.mean * result.seconds + result.refused) * result.case.share)


def _print(results: Iterable[Result]) -> None:
    rows = [_HEADS, *map(_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")


def _row(result: Result) -> tuple[str, ...]:
    case = result.case
    memory = _MEMORY_MB + case.nodes * PODS * _MEMORY_A_POD_B / 1e6
    quiet = case.story == "steady"
    return (
        f"{case.nodes:,}",
        f"{case.life_s / _HOUR_S:.0f} h",
        "all" if case.share == 1 else f"{case.nodes * case.share:,.0f}",
        str(case.replicas),
        f"{memory:.0f}",
        f"{result.mean:,.0f}" if result.mean >= 10 else f"{result.mean:.1f}",
        f"{result.worst:,.0f}",
        f"{result.worst / result.mean:.2f}",
        f"{chance_alone(result.mean * case.share, result.seconds) / (result.mean * case.share):.2f}",
        "" if quiet or not result.later_worst else f"{result.later_worst / result.usual:.1f}",
        f"{result.reviews_mean:,.0f}",
        f"{result.reviews_worst:,.0f}",
        f"{result.refused:,}",
        "" if quiet else f"{result.seconds:,} s",
        "" if case.story != "outage" else f"{result.expired_in:,}",
        "" if case.story != "outage" else f"{result.expired_after:,}",
    )


def chance_alone(mean: float, seconds: int) -> int:
    """The worst of so many seconds, as often more as less, if chance alone spread the certificates (Poisson)."""
    count, probability = 0, math.exp(-mean)
    if not probability:  # beyond floating point, where the normal distribution does as well
        return round(mean + math.sqrt(2 * mean * math.log(seconds)))
    below = probability
    while below**seconds < 0.5:
        count += 1
        probability *= mean / count
        below += probability
    return count


if __name__ == "__main__":
    main()
