"""A model of the authority's replicas: their capacity, what they reject, and their requests to the API server."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace

_NODE_REVIEW_CACHED_S = 5.0
"""How long the authority caches the TokenReview of a node's token. Each certificate needs a review of the pod's token."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The assumptions. docs/scaling.md explains which of them are measured."""

    issue_per_core_s: float = 900.0  # certificates per second of one replica with one core
    rejection_s: float = 0.0004  # CPU time of a rejected call, as for an echo over TLS
    max_in_progress: int = 512
    """Calls in progress in one replica. It rejects others with AuthorityOverloaded (csi_driver/authority/issuance/pipeline.py)."""
    review_s: float = 0.005  # the latency of a TokenReview
    unavailable_timeout_s: float = 6.0
    """How long a node waits for a replica that does not respond (csi_driver/node/authority_client.py)."""
    reconnect_s: float = 5.0  # the longest time until a node's connection finds an available replica

    def scaled(self, share: float) -> Figures:
        """Return the figures for a sample of the nodes: this share of the capacity, and the same latencies."""
        return replace(
            self,
            issue_per_core_s=self.issue_per_core_s * share,
            rejection_s=self.rejection_s / share,
            max_in_progress=round(self.max_in_progress * share),
        )


@dataclass(slots=True)
class Counts:
    """Events in each second of the simulation."""

    issued: Counter[int] = field(default_factory=Counter)
    rejected: Counter[int] = field(default_factory=Counter)
    reviews: Counter[int] = field(default_factory=Counter)


class Authority:
    """Replicas behind one address, unavailable until ``available_at``. ``position_of`` places each node in [0, 1)."""

    def __init__(self, replicas: int, figures: Figures, available_at: float, position_of: list[float]) -> None:
        self.figures = figures
        self.counts = Counts()
        self._available_at = available_at
        self._replica_of = [int(position * replicas) for position in position_of]
        self._reviewed_until = [-math.inf] * len(position_of)
        self._free_at = [available_at] * replicas
        self._in_progress: list[deque[float]] = [deque() for _ in range(replicas)]

    def is_unavailable(self, now: float) -> bool:
        """Return True if a call that starts now fails without a response."""
        return now + self.figures.unavailable_timeout_s < self._available_at

    def arrival(self, now: float, jitter: float) -> float:
        """Return the time when a call that starts now reaches a replica."""
        return now if now >= self._available_at else self._available_at + jitter * self.figures.reconnect_s

    def call(self, node: int, now: float) -> tuple[float, bool]:
        """Process a call that has reached its replica. Return the time of the response, and True if it is a certificate."""
        replica, figures = self._replica_of[node], self.figures
        in_progress = self._in_progress[replica]
        while in_progress and in_progress[0] <= now:
            in_progress.popleft()
        start = max(self._free_at[replica], now)
        if len(in_progress) >= figures.max_in_progress:
            self._free_at[replica] = start + figures.rejection_s
            self.counts.rejected[math.floor(now)] += 1
            return start + figures.rejection_s, False
        end = start + 1 / figures.issue_per_core_s
        self._free_at[replica] = end
        in_progress.append(end + figures.review_s)
        second = math.floor(end)
        self.counts.issued[second] += 1
        self.counts.reviews[second] += 1
        if now >= self._reviewed_until[node]:
            self._reviewed_until[node] = now + _NODE_REVIEW_CACHED_S
            self.counts.reviews[math.floor(now)] += 1
        return end + figures.review_s, True
