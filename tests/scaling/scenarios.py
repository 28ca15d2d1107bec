"""The stories: a day like any other, the end of an outage, a zone that starts anew. Second 0 is when that happens."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

from tests.scaling.authority import Authority, Figures
from tests.scaling.cluster import Cluster

PODS = 110
_OUTAGE_S = 3600.0
_BEFORE_S = 60.0
"""Of the outage that is played with all others; before it, each node is alone with its tries."""
_BOOT_SPREAD_S = 60.0
"""From the first node of the zone that starts pods to the last."""
_MOUNTS_SPREAD_S = 2.0
"""In which a kubelet begins with the volumes of all its pods."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is played."""

    story: str
    nodes: int
    life_s: float
    replicas: int
    share: float = 1.0
    """Of the nodes that are played, with an authority of as much less power; 1: all of them, exactly."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it. Certificates and TokenReviews per second."""

    case: Case
    mean: float
    worst: float
    usual: float
    """The mean of a day like any other."""
    seconds: int
    """That these figures are of: after an event, until the last one that was due or waited had its certificate."""
    reviews_mean: float
    reviews_worst: float
    refused: int
    expired_in: int
    """Certificates that ended in the outage."""
    expired_after: int
    """Certificates that were still good when the authority was back, and ended before their successors came."""
    later_worst: float
    """The worst second of all that came later in the story, when what was issued together is renewed."""


def replicas_for(nodes: int, life_s: float, figures: Figures) -> int:
    """Enough for twice the mean of a usual day by all but one of them, and never fewer than two."""
    return max(2, math.ceil(2 * steady_mean(nodes, life_s) / figures.issue_per_core_s) + 1)


def steady_mean(nodes: int, life_s: float) -> float:
    """Renewals a second: each volume at two thirds of its certificate's life."""
    return nodes * PODS / (life_s * 2 / 3)


def play(case: Case, figures: Figures, seed: int = 1) -> Result:
    """Plays a case exactly: every node and every call."""
    return {"steady": _steady, "outage": _outage, "zone": _zone}[case.story](case, figures, seed)


def _fill(cluster: Cluster, rng: random.Random, since: float, horizon: float, nodes: range) -> None:
    """Volumes as a long quiet time leaves them: at ``since`` each one is somewhere between issuance and renewal.

    What falls due after the horizon is left out.
    """
    for node in nodes:
        for number in range(PODS):
            planned = cluster.plan(0.0, 0.0)
            issued_at = since - rng.random() * planned
            if issued_at + planned < horizon:
                cluster.add(cluster.nodes[node], str(number), issued_at, issued_at + planned)


def _cluster(case: Case, figures: Figures, seed: int, back_at: float) -> tuple[Cluster, random.Random]:
    rng = random.Random(seed)  # noqa: S311  # rng that can be repeated
    nodes = round(case.nodes * case.share)
    authority = Authority(case.replicas, figures.of(case.share), back_at, [rng.random() for _ in range(nodes)])
    return Cluster(nodes, case.life_s, authority, seed + 1), rng


def _steady(case: Case, figures: Figures, seed: int) -> Result:
    end = 3600.0 if case.life_s > 3600 else 600.0
    cluster, rng = _cluster(case, figures, seed, back_at=-math.inf)
    _fill(cluster, rng, 0.0, end, range(len(cluster.nodes)))
    cluster.run(0.0, end)
    return _result(case, cluster, int(end), int(end))


def _outage(case: Case, figures: Figures, seed: int) -> Result:
    end = min(case.life_s * 1.1, 1.5 * _OUTAGE_S)
    cluster, rng = _cluster(case, figures, seed, back_at=0.0)
    _fill(cluster, rng, -_OUTAGE_S, end, range(len(cluster.nodes)))
    for node in cluster.nodes:
        cluster.simulate_outage(node, -_BEFORE_S)
    cluster.run(-_BEFORE_S, end)
    return _result(case, cluster, max(math.ceil(cluster.caught_up_at), 1), int(end))


def _zone(case: Case, figures: Figures, seed: int) -> Result:
    end = case.life_s * 1.1 if case.life_s <= 3600 else 600.0
    cluster, rng = _cluster(case, figures, seed, back_at=-math.inf)
    zone = len(cluster.nodes) // 3
    _fill(cluster, rng, 0.0, end, range(zone, len(cluster.nodes)))
    for node in range(zone):
        boot = rng.random() * _BOOT_SPREAD_S
        for number in range(PODS):
            cluster.add_new_pod(cluster.nodes[node], str(number), boot + rng.random() * _MOUNTS_SPREAD_S)
    cluster.run(0.0, end)
    return _result(case, cluster, max(math.ceil(cluster.caught_up_at), 1), int(end))


def _result(case: Case, cluster: Cluster, seconds: int, end: int) -> Result:
    counts, share = cluster.authority.counts, case.share
    mean, worst = _mean_and_worst(counts.issued, range(seconds), share)
    reviews_mean, reviews_worst = _mean_and_worst(counts.reviews, range(seconds), share)
    _, later_worst = _mean_and_worst(counts.issued, range(seconds, end), share)
    return Result(
        case=case,
        mean=mean,
        worst=worst,
        usual=steady_mean(case.nodes, case.life_s),
        seconds=seconds,
        reviews_mean=reviews_mean,
        reviews_worst=reviews_worst,
        refused=round(sum(counts.refused.values()) / share),
        expired_in=round((cluster.expired - cluster.expired_after) / share),
        expired_after=round(cluster.expired_after / share),
        later_worst=later_worst,
    )


def _mean_and_worst(counts: Counter[int], seconds: range, share: float) -> tuple[float, float]:
    if not seconds:
        return 0.0, 0.0
    found = [counts[second] / share for second in seconds]
    return sum(found) / len(found), max(found)
