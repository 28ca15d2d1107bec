"""Rate limits and concurrency limits for pods, nodes and the whole authority."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from prometheus_client import Gauge

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity


@dataclass(frozen=True, slots=True)
class Rate:
    """The parameters of a token bucket."""

    per_second: float
    burst: int


POD_RATE = Rate(5, 100)
"""Ten volumes with a lifetime of 10 s need 2 to 3 calls per second, including retries. The burst serves a pod with 100 volumes."""
NODE_RATE = Rate(50, 1000)
"""250 pods with a lifetime of 10 s need 38 calls per second. The burst serves 250 pods with four volumes that start at once."""
REPORT_RATE = Rate(5, 500)
"""The burst serves 250 pods with two volumes, whose driver reports the start and later the end of an outage once each."""
MAX_STREAMS_PER_NODE = 4  # a node needs one stream, and two while its driver restarts
MAX_ISSUES_PER_NODE = 256
"""Half of the authority's concurrent calls, so that one node cannot use all of them while the API server is slow."""
_MAX_BUCKETS = 50_000  # about 10 MB
_DROPS_PER_CALL = 4


@dataclass(eq=False)
class RateLimiter:
    """One token bucket per key. Memory is bounded: full buckets are dropped, and the oldest ones beyond ``max_buckets``."""

    rate: Rate
    clock: Callable[[], float] = time.monotonic
    max_buckets: int = _MAX_BUCKETS

    def __post_init__(self) -> None:
        # Ordered by the time of the last call. The values are the calls left at that time, and the time.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str) -> float:
        """Count one call. Return 0 if it is allowed, otherwise the seconds until the next call is."""
        now, rate = self.clock(), self.rate
        left, since = self._buckets.get(key, (float(rate.burst), now))
        left = min(left + (now - since) * rate.per_second, rate.burst)
        allowed = left >= 1
        self._buckets[key] = (left - 1 if allowed else left, now)
        self._buckets.move_to_end(key)
        self._drop_full_buckets(now)
        return 0.0 if allowed else (1 - left) / rate.per_second

    def _drop_full_buckets(self, now: float) -> None:
        full_after_s = self.rate.burst / self.rate.per_second
        for _ in range(_DROPS_PER_CALL):
            oldest = next(iter(self._buckets))
            if now - self._buckets[oldest][1] < full_after_s and len(self._buckets) <= self.max_buckets:
                return
            del self._buckets[oldest]


class ConcurrencyLimit:
    """A context manager that admits at most ``maximum`` concurrent calls; raises CertmountError AuthorityOverloaded."""

    __slots__ = ("_active", "_gauge", "_maximum")

    def __init__(self, maximum: int, gauge: Gauge | None = None) -> None:
        self._maximum, self._gauge, self._active = maximum, gauge, 0

    def __enter__(self) -> None:
        if self._active >= self._maximum:
            raise CertmountError(Reason.AUTHORITY_OVERLOADED, f"{self._active} calls are already in progress")
        self._change(1)

    def __exit__(self, *_error: object) -> None:
        self._change(-1)

    def _change(self, by: int) -> None:
        self._active += by
        if self._gauge is not None:
            self._gauge.set(self._active)


class RequestLimits:
    """The limits per authenticated pod and node. ``stream`` and ``issue`` count calls while their block runs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = RateLimiter(NODE_RATE, clock)
        self._pods = RateLimiter(POD_RATE, clock)
        self._reports = RateLimiter(REPORT_RATE, clock)
        self._streams: Counter[str] = Counter()
        self._issues: Counter[str] = Counter()

    def count_node_issue(self, node: PodIdentity) -> None:
        _count(self._nodes, node.node_uid, f"node {node.node_name}")

    def count_pod_issue(self, pod: PodIdentity) -> None:
        _count(self._pods, pod.pod_uid, str(pod))

    def count_report(self, node: PodIdentity) -> None:
        _count(self._reports, node.node_uid, f"reports of node {node.node_name}")

    def stream(self, node: PodIdentity) -> AbstractContextManager[None]:
        return _hold(self._streams, MAX_STREAMS_PER_NODE, node, "WatchTrust streams")

    def issue(self, node: PodIdentity) -> AbstractContextManager[None]:
        return _hold(self._issues, MAX_ISSUES_PER_NODE, node, "concurrent Issue calls")


@contextlib.contextmanager
def _hold(active: Counter[str], maximum: int, node: PodIdentity, what: str) -> Iterator[None]:
    if active[node.node_uid] >= maximum:
        fault = Fault(f"node {node.node_name}", f"has {maximum} {what}, the maximum")
        raise CertmountError(Reason.TOO_MANY_REQUESTS, fault)
    active[node.node_uid] += 1
    try:
        yield
    finally:
        active[node.node_uid] -= 1
        if not active[node.node_uid]:
            del active[node.node_uid]


def _count(limiter: RateLimiter, key: str, caller: str) -> None:
    if wait_s := limiter.take(key):
        hint = f"retry after {max(1, math.ceil(wait_s))} s"
        raise CertmountError(Reason.TOO_MANY_REQUESTS, Fault(caller, "exceeds the authority's rate limit", hint))
