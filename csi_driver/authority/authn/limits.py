"""Rate limits and shares of the authority for pods, Secrets, nodes and callers that are not authenticated yet."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from urllib.parse import unquote

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, Requester, SecretIdentity
from csi_driver.core.shares import FairShares
from csi_driver.core.spec import DEFAULT_ISSUER


@dataclass(frozen=True, slots=True)
class Rate:
    """The parameters of a token bucket."""

    per_second: float
    burst: int


POD_RATE = Rate(5, 100)
"""Ten volumes with a lifetime of 10 s need 2 to 3 calls per second, including retries. The burst serves a pod with 100 volumes."""
NODE_RATE = Rate(50, 2000)
"""250 pods with a lifetime of 10 s need 38 calls per second. A namespace on the node gets as much of the burst as it leaves to
the others: half of it if no other is busy, which serves 250 pods with four volumes that start at once.
"""
SECRET_RATE = Rate(0.5, 20)
"""Of one Secret. A certificate with a lifetime of 10 s needs a call every 6 s; a Secret whose source changes more often waits."""
OTHER_CALLS_RATE = Rate(5, 500)
"""The burst serves 250 pods with two volumes, whose driver reports the start and later the end of an outage once each."""
FAILURE_RATE = Rate(50, 1000)
"""Rejected calls from one address. The burst serves 250 pods with four volumes that all fail.

The authority does not log further ones, and delays their answers, so that a caller that waits for them makes fewer calls.
"""
_FAILURE_DELAY_S = 3.0  # a node waits for an answer at least 6 s
MAX_DELAYED = 4096  # each needs about 20 kB
MAX_STREAMS = 10_000
"""Twice the nodes of the largest supported cluster (Kubernetes: 5,000): a node can reconnect before its old stream ends."""
MAX_STREAMS_PER_NODE = 4  # a node needs one stream, and two while its driver restarts
MAX_ISSUE_STREAMS_PER_NODE = 8
"""A node uses two streams, one for external issuers. Others can remain while they finish, and for a minute after a connection was lost."""
MAX_CALLERS = 512
"""Calls that are not authenticated yet: Issue calls, and separately the others. Their requests use at most 64 MiB each."""
MAX_ISSUES = 512
"""More calls would wait longer than the drivers' retries take."""
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

    def left(self, key: str) -> float:
        """Return the number of calls that are allowed now."""
        left, since = self._buckets.get(key, (float(self.rate.burst), 0.0))
        return min(left + (self.clock() - since) * self.rate.per_second, self.rate.burst)

    def give_back(self, key: str) -> None:
        """Undo the count of a call."""
        if key in self._buckets:
            left, since = self._buckets[key]
            self._buckets[key] = min(left + 1, self.rate.burst), since

    def _drop_full_buckets(self, now: float) -> None:
        full_after_s = self.rate.burst / self.rate.per_second
        for _ in range(_DROPS_PER_CALL):
            oldest = next(iter(self._buckets))
            if now - self._buckets[oldest][1] < full_after_s and len(self._buckets) <= self.max_buckets:
                return
            del self._buckets[oldest]


class RequestLimits:
    """The limits of callers, pods, Secrets and nodes. The methods that return a context manager count a call while its block runs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = RateLimiter(NODE_RATE, clock)
        self._namespaces = RateLimiter(NODE_RATE, clock)  # on each node, and in the Secrets controller
        self._pods = RateLimiter(POD_RATE, clock)
        self._secrets = RateLimiter(SECRET_RATE, clock)
        self._other_calls = RateLimiter(OTHER_CALLS_RATE, clock)
        self._failures, self._logged_failures = RateLimiter(FAILURE_RATE, clock), RateLimiter(FAILURE_RATE, clock)
        self._receiving = FairShares(
            "calls whose request has not arrived", MAX_CALLERS, full=Reason.AUTHORITY_OVERLOADED
        )
        self._delayed = FairShares("rejected calls with a delayed answer", MAX_DELAYED)
        self._streams = FairShares("WatchTrust streams", MAX_STREAMS, full=Reason.AUTHORITY_OVERLOADED)
        self._issue_streams = FairShares("IssueStream streams", MAX_STREAMS, full=Reason.AUTHORITY_OVERLOADED)
        # Separate, so that reports about an outage cannot block the calls that end it.
        self._callers = {
            of: FairShares(f"{of} that are not authenticated yet", MAX_CALLERS, full=Reason.AUTHORITY_OVERLOADED)
            for of in ("Issue calls", "other calls")
        }
        # Separate, because an external issuer can take a minute, and the pods of the internal CA must not wait for it.
        self._issues = {
            of: FairShares(f"Issue calls to {of} in progress", MAX_ISSUES, full=Reason.AUTHORITY_OVERLOADED)
            for of in ("the internal CA", "external issuers")
        }

    def count_node_issue(self, node: PodIdentity) -> None:
        _count(self._nodes, node.node_uid, f"node {node.node_name}")

    def count_pod_issue(self, pod: PodIdentity) -> None:
        """Count a call that :meth:`count_node_issue` has counted. A refused one does not count for the node."""
        with self._counted_for(pod.node_uid):
            _count(self._pods, pod.pod_uid, str(pod))
            self._count_namespace_issue(pod.node_uid, f"node {pod.node_name}", pod.service_account.namespace)

    def count_secret_issue(self, controller: PodIdentity, secret: SecretIdentity) -> None:
        """Count a call of the Secrets controller, whose limits are those of a node."""
        _count(self._nodes, controller.pod_uid, str(controller))
        with self._counted_for(controller.pod_uid):
            _count(self._secrets, str(secret), str(secret))
            self._count_namespace_issue(controller.pod_uid, "the Secrets controller", secret.namespace)

    @contextlib.contextmanager
    def _counted_for(self, caller: str) -> Iterator[None]:
        try:
            yield
        except CertmountError:
            self._nodes.give_back(caller)
            raise

    def _count_namespace_issue(self, caller: str, name: str, namespace: str) -> None:
        key = f"{caller} {namespace}"
        used, left = NODE_RATE.burst - self._namespaces.left(key), self._nodes.left(caller)
        if used > left:
            problem = f"has used {used:.0f} of the {NODE_RATE.burst} calls of {name}, its share"
            hint = f"{NODE_RATE.per_second:g} more per second are possible"
            fault = Fault(f"namespace {namespace}", problem, hint)
            raise CertmountError(Reason.SHARE_EXCEEDED, fault)
        self._namespaces.take(key)

    def count_other_call(self, node: PodIdentity) -> None:
        _count(self._other_calls, node.node_uid, f"calls of node {node.node_name} other than Issue")

    def count_controller_call(self, controller: PodIdentity) -> None:
        _count(self._other_calls, controller.pod_uid, f"calls of {controller} other than Issue")

    def may_log_failure(self, address: str) -> bool:
        """Return whether the audit log has an entry for a rejected call: a flood of calls must not fill the log."""
        return not self._logged_failures.take(address)

    async def answer_failure(self, peer: str, /) -> bool:
        """Implements :class:`csi_driver.rpc.server.CallerLimits`."""
        address = caller_address(peer)
        if not self._failures.take(address):
            return True
        with contextlib.suppress(CertmountError), self._delayed.hold((f"address {address}",)):
            await asyncio.sleep(_FAILURE_DELAY_S * random.uniform(0.5, 1.5))  # noqa: S311  # spreads the next calls
        return False

    def receiving(self, peer: str, /) -> AbstractContextManager[None]:
        """Implements :class:`csi_driver.rpc.server.CallerLimits`."""
        return self._receiving.hold((f"address {caller_address(peer)}",))

    def authentication(self, address: str, *, issue: bool) -> AbstractContextManager[None]:
        """Count a call while it is authenticated. Until then, only the address of its caller is known."""
        return self._callers["Issue calls" if issue else "other calls"].hold((f"address {address}",))

    def issue(self, requester: Requester, issuer: str) -> AbstractContextManager[None]:
        if issuer == DEFAULT_ISSUER:
            return self._issues["the internal CA"].hold(requester.owners)
        return self._issues["external issuers"].hold((f"issuer {issuer}", *requester.owners))

    def stream(self, node: PodIdentity) -> AbstractContextManager[None]:
        return _stream(self._streams, f"node {node.node_name}", MAX_STREAMS_PER_NODE)

    def controller_stream(self, controller: PodIdentity) -> AbstractContextManager[None]:
        return _stream(self._streams, str(controller), MAX_STREAMS_PER_NODE)

    def issue_stream(self, node: PodIdentity) -> AbstractContextManager[None]:
        return _stream(self._issue_streams, f"node {node.node_name}", MAX_ISSUE_STREAMS_PER_NODE)


def _stream(shares: FairShares, owner: str, most: int) -> AbstractContextManager[None]:
    if shares.held(owner) >= most:
        raise CertmountError(
            Reason.SHARE_EXCEEDED, Fault(owner, f"has {most} {shares.resource}, its share", "end one of them")
        )
    return shares.hold((owner,))


def caller_address(peer: str) -> str:
    """Return the IP address in a gRPC peer such as ``ipv4:10.0.0.1:4711`` or ``ipv6:%5Bfd00::1%5D:4711``."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")


def _count(limiter: RateLimiter, key: str, caller: str) -> None:
    if wait_s := limiter.take(key):
        hint = f"retry after {max(1, math.ceil(wait_s))} s"
        raise CertmountError(Reason.TOO_MANY_REQUESTS, Fault(caller, "exceeds the authority's rate limit", hint))
