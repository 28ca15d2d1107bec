"""How much one pod, one node and all together may ask: what is beyond is told when to come again, and costs nothing more."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: ``burst`` calls at once, then ``a_second``."""

    a_second: float
    burst: int


POD_RATE = Rate(5, 100)
"""Ten volumes that live 10 s ask 2 to 3 times a second with what they retry. The burst is a pod with a hundred volumes."""
NODE_RATE = Rate(50, 1000)
"""250 pods that live 10 s each ask 38 times a second. The burst is 250 pods with four volumes each that start, or come back from
an outage, at once; and a node that asks without a pause takes no more than a twentieth of a replica."""
REPORT_RATE = Rate(5, 500)
"""Each of 250 pods with two volumes is told of when an outage begins and ends; a node driver tells of each change once."""
MOST_WATCHES = 4
"""Streams of one node: that of its driver, that of its driver before a restart, and twice as many."""
MOST_ASKING = 256
"""Calls of Issue under way for one node, half of all: while the API server is slow a node can't take every place. More than 250
pods that start at the same moment come in turns."""
_MOST_KEYS = 50_000
"""Pods or nodes that are remembered: 10 MB. One that has not asked for long is as good as new, and forgotten first."""
_FORGET_AT_ONCE = 4


class RateLimiter:
    """A token bucket for each key. Memory is bounded: keys whose bucket is full again are dropped, at the bound the oldest."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic, most_keys: int = _MOST_KEYS) -> None:
        self._rate = rate
        self._clock = clock
        self._most_keys = most_keys
        self._full_after_s = rate.burst / rate.a_second
        # By the time of the last call: how many calls were left then, and when that was.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str) -> float:
        """Takes one call of the key's; 0, or where none is left the seconds until there is one."""
        now = self._clock()
        rate = self._rate
        left, since = self._buckets.get(key, (float(rate.burst), now))
        left = min(left + (now - since) * rate.a_second, rate.burst)
        allowed = left >= 1
        self._buckets[key] = (left - 1 if allowed else left, now)
        self._buckets.move_to_end(key)
        self._forget(now)
        return 0.0 if allowed else (1 - left) / rate.a_second

    def _forget(self, now: float) -> None:
        for _ in range(_FORGET_AT_ONCE):
            oldest = next(iter(self._buckets))
            if now - self._buckets[oldest][1] < self._full_after_s and len(self._buckets) <= self._most_keys:
                return
            del self._buckets[oldest]


class Counted(Protocol):
    """A gauge."""

    def set(self, value: float) -> None:
        """Takes the number as it is now."""


class ConcurrencyLimit:
    """A bounded number of calls under way; ``with slots:`` is one of them."""

    __slots__ = ("_gauge", "_most", "_taken")

    def __init__(self, most: int, gauge: Counted | None = None) -> None:
        self._most = most
        self._gauge = gauge
        self._taken = 0

    def __enter__(self) -> None:
        if self._taken >= self._most:
            raise CertmountError(Reason.AUTHORITY_OVERLOADED, f"{self._taken} calls are under way already")
        self._taken += 1
        if self._gauge is not None:
            self._gauge.set(self._taken)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._taken -= 1
        if self._gauge is not None:
            self._gauge.set(self._taken)


class RequestLimits:
    """Those of one replica. The keys are uids that have been proven, so no one can use up what is another's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = RateLimiter(NODE_RATE, clock)
        self._pods = RateLimiter(POD_RATE, clock)
        self._reports = RateLimiter(REPORT_RATE, clock)
        self._watches: Counter[str] = Counter()
        self._asking: Counter[str] = Counter()

    def count_node(self, node: PodIdentity) -> None:
        """One more Issue of a node; raises CertmountError TooManyRequests."""
        _count(self._nodes, node.node_uid, f"node {node.node_name}")

    def count_pod(self, pod: PodIdentity) -> None:
        """One more Issue for a pod; raises CertmountError TooManyRequests."""
        _count(self._pods, pod.pod_uid, str(pod))

    def count_report(self, node: PodIdentity) -> None:
        """One more Report or ConfirmTrust of a node; raises CertmountError TooManyRequests."""
        _count(self._reports, node.node_uid, f"reports of node {node.node_name}")

    def watching(self, node: PodIdentity) -> AbstractContextManager[None]:
        """A stream of a node's for the length of the block; raises CertmountError TooManyRequests."""
        return _one_of(self._watches, MOST_WATCHES, node, f"watches the roots {MOST_WATCHES} times already")

    def asking(self, node: PodIdentity) -> AbstractContextManager[None]:
        """An Issue of a node's for the length of the block; raises CertmountError TooManyRequests."""
        return _one_of(self._asking, MOST_ASKING, node, f"waits for {MOST_ASKING} certificates already")


@contextlib.contextmanager
def _one_of(taken: Counter[str], most: int, node: PodIdentity, problem: str) -> Iterator[None]:
    if taken[node.node_uid] >= most:
        raise CertmountError(Reason.TOO_MANY_REQUESTS, Fault(f"node {node.node_name}", problem))
    taken[node.node_uid] += 1
    try:
        yield
    finally:
        taken[node.node_uid] -= 1
        if not taken[node.node_uid]:
            del taken[node.node_uid]


def _count(buckets: RateLimiter, key: str, who: str) -> None:
    wait_s = buckets.take(key)
    if wait_s:
        hint = f"come again in {max(1, math.ceil(wait_s))} s"
        raise CertmountError(Reason.TOO_MANY_REQUESTS, Fault(who, "more calls than the authority allows", hint))
