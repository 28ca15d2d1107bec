"""A model of the authority's replicas: what they can take, what they refuse, and what they ask of the API server."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace

_NODE_PROOF_KEPT_S = 5.0
"""How long the review of a node's token counts; a pod's is asked for by each certificate of its own."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Measured, or assumed where nothing was; docs/scaling.md says which."""

    issue_per_core_s: float = 900.0
    """Certificates a second of one replica, which has one core."""
    refuse_s: float = 0.0004
    """A core's time for a call that is refused for want of room: the call itself, as in an echo over TLS."""
    most_in_flight: int = 512
    """Calls under way in one replica; one more is AuthorityOverloaded (csi_driver/authority/service.py)."""
    review_s: float = 0.005
    """A TokenReview's latency."""
    patience_s: float = 6.0
    """How long a node waits for a replica that does not answer (csi_driver/node/authority_client.py)."""
    reconnect_s: float = 5.0
    """The most that a node's connection needs to find a replica that is back."""

    def of(self, share: float) -> Figures:
        """An authority for a fair sample of the nodes: with that share of the power and the room, and the same latencies."""
        return replace(
            self,
            issue_per_core_s=self.issue_per_core_s * share,
            refuse_s=self.refuse_s / share,
            most_in_flight=round(self.most_in_flight * share),
        )


@dataclass(slots=True)
class Counts:
    """Per second of the story, by its number."""

    issued: Counter[int] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    reviews: Counter[int] = field(default_factory=Counter)


class Authority:
    """Replicas behind one address; a node keeps the connection that it has. Away until ``back_at``."""

    def __init__(self, replicas: int, figures: Figures, back_at: float, chance_of: list[float]) -> None:
        self.figures = figures
        self.counts = Counts()
        self._back_at = back_at
        self._replica_of = [int(chance * replicas) for chance in chance_of]
        self._proven_until = [-math.inf] * len(chance_of)
        self._free_at = [back_at] * replicas
        self._under_way: list[deque[float]] = [deque() for _ in range(replicas)]

    def away(self, now: float) -> bool:
        """True where a call begun now gets no answer in time."""
        return now + self.figures.patience_s < self._back_at

    def arrival(self, now: float, chance: float) -> float:
        """When a call begun now reaches a replica."""
        return now if now >= self._back_at else self._back_at + chance * self.figures.reconnect_s

    def ask(self, node: int, now: float) -> tuple[float, bool]:
        """A call that has reached its replica: when it is answered, and whether with a certificate."""
        replica, figures = self._replica_of[node], self.figures
        under_way = self._under_way[replica]
        while under_way and under_way[0] <= now:
            under_way.popleft()
        begin = max(self._free_at[replica], now)
        if len(under_way) >= figures.most_in_flight:
            self._free_at[replica] = begin + figures.refuse_s
            self.counts.refused[math.floor(now)] += 1
            return begin + figures.refuse_s, False
        end = begin + 1 / figures.issue_per_core_s
        self._free_at[replica] = end
        under_way.append(end + figures.review_s)
        second = math.floor(end)
        self.counts.issued[second] += 1
        self.prove_node(node, now)
        self.counts.reviews[second] += 1
        return end + figures.review_s, True

    def prove_node(self, node: int, now: float) -> None:
        """The node's own token is reviewed, unless that was done just now."""
        if now >= self._proven_until[node]:
            self._proven_until[node] = now + _NODE_PROOF_KEPT_S
            self.counts.reviews[math.floor(now)] += 1
