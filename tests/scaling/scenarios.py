"""The scenarios: normal operation, the end of an outage, and a zone that restarts. The event is at second 0."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

from csi_driver.authority.server import MAX_CONNECTIONS
from tests.scaling.authority import Authority, Figures
from tests.scaling.cluster import Cluster

PODS = 110
_OUTAGE_S = 3600.0
_SIMULATED_OUTAGE_S = 60.0  # The end of the outage, simulated with all nodes. Before it, each node is simulated alone.
_BOOT_S = 60.0  # the time between the first and the last node of the zone that starts its pods
_MOUNT_S = 2.0  # the time in which a kubelet starts to mount the volumes of all its pods


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a table."""

    scenario: str
    nodes: int
    lifetime_s: float
    replicas: int
    share: float = 1.0  # the share of the nodes that is simulated, with an authority of the same share of the capacity


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a case. Certificates and TokenReviews per second."""

    case: Case
    mean: float
    worst: float
    usual: float  # the mean in normal operation
    seconds: int  # the length of the period: until the last certificate that was due or a new pod waited for
    reviews_mean: float
    reviews_worst: float
    rejected: int
    expired_in: int  # certificates that expired in the outage
    expired_after: int  # certificates that were still valid at the end of the outage and expired before their renewal
    later_worst: float  # the worst second after the period, when certificates that were issued together are renewed


def replicas_for(nodes: int, lifetime_s: float, figures: Figures) -> int:
    """Return the replicas for twice the usual load and the connections of all nodes with one replica unavailable."""
    for_load = math.ceil(2 * usual_mean(nodes, lifetime_s) / figures.issue_per_core_s)
    for_connections = nodes // MAX_CONNECTIONS + 1  # not all of them: the Secrets controller has one too
    return max(for_load, for_connections) + 1


def usual_mean(nodes: int, lifetime_s: float) -> float:
    """Return the renewals per second if each volume is renewed at two thirds of the lifetime."""
    return nodes * PODS / (lifetime_s * 2 / 3)


def simulate(case: Case, figures: Figures, seed: int = 1) -> Result:
    return {"normal": _normal, "outage": _outage, "zone": _zone}[case.scenario](case, figures, seed)


def _add_volumes(cluster: Cluster, rng: random.Random, since: float, until: float, nodes: range) -> None:
    """Add volumes whose certificates are at a random point between issuance and renewal at ``since``.

    Ignore those that are due after ``until``.
    """
    for node in nodes:
        for number in range(PODS):
            planned = cluster.plan(0.0, 0.0)
            issued_at = since - rng.random() * planned
            if issued_at + planned < until:
                cluster.add(cluster.nodes[node], str(number), issued_at, issued_at + planned)


def _cluster(case: Case, figures: Figures, seed: int, available_at: float) -> tuple[Cluster, random.Random]:
    rng = random.Random(seed)  # noqa: S311  # The simulation must be repeatable.
    nodes = round(case.nodes * case.share)
    authority = Authority(case.replicas, figures.scaled(case.share), available_at, [rng.random() for _ in range(nodes)])
    return Cluster(nodes, case.lifetime_s, authority, seed + 1), rng


def _normal(case: Case, figures: Figures, seed: int) -> Result:
    end = 3600.0 if case.lifetime_s > 3600 else 600.0
    cluster, rng = _cluster(case, figures, seed, available_at=-math.inf)
    _add_volumes(cluster, rng, 0.0, end, range(len(cluster.nodes)))
    cluster.run(0.0, end)
    return _result(case, cluster, int(end), int(end))


def _outage(case: Case, figures: Figures, seed: int) -> Result:
    end = min(case.lifetime_s * 1.1, 1.5 * _OUTAGE_S)
    cluster, rng = _cluster(case, figures, seed, available_at=0.0)
    _add_volumes(cluster, rng, -_OUTAGE_S, end, range(len(cluster.nodes)))
    for node in cluster.nodes:
        cluster.simulate_outage(node, -_SIMULATED_OUTAGE_S)
    cluster.run(-_SIMULATED_OUTAGE_S, end)
    return _result(case, cluster, max(math.ceil(cluster.caught_up_at), 1), int(end))


def _zone(case: Case, figures: Figures, seed: int) -> Result:
    end = case.lifetime_s * 1.1 if case.lifetime_s <= 3600 else 600.0
    cluster, rng = _cluster(case, figures, seed, available_at=-math.inf)
    zone = len(cluster.nodes) // 3
    _add_volumes(cluster, rng, 0.0, end, range(zone, len(cluster.nodes)))
    for node in cluster.nodes[:zone]:
        boot = rng.random() * _BOOT_S
        for number in range(PODS):
            cluster.add_new_pod(node, str(number), boot + rng.random() * _MOUNT_S)
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
        usual=usual_mean(case.nodes, case.lifetime_s),
        seconds=seconds,
        reviews_mean=reviews_mean,
        reviews_worst=reviews_worst,
        rejected=round(sum(counts.rejected.values()) / share),
        expired_in=round((cluster.expired - cluster.expired_after) / share),
        expired_after=round(cluster.expired_after / share),
        later_worst=later_worst,
    )


def _mean_and_worst(counts: Counter[int], seconds: range, share: float) -> tuple[float, float]:
    if not seconds:
        return 0.0, 0.0
    found = [counts[second] / share for second in seconds]
    return sum(found) / len(found), max(found)
