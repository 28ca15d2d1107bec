"""Keys and CSRs of requests that have no final result yet.

A retry uses the same key and CSR, so that a slow issuer gets one order. The kubelet ends a call after two minutes and then
removes the volume, but an order at a public CA can take longer. Therefore keys outlive the call and the volume. They are
kept in memory only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.node.issuance.certificate_request import RequestKey

_MAX_REQUESTS = 1_000  # ten times the volumes of a busy node
_EXPIRES_AFTER_S = 3600.0
"""The kubelet retries within minutes. A request without a retry for this long belongs to a deleted pod."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A private key and the CSR (PKCS #10, DER) that it has signed."""

    key: PrivateKey = field(repr=False)
    csr: bytes = field(repr=False)


class PendingRequests:
    """Prepared requests, the least recently used first. ``clock`` returns unix seconds."""

    def __init__(self, clock: Callable[[], float], max_requests: int = _MAX_REQUESTS) -> None:
        self._clock = clock
        self._max_requests = max_requests
        self._requests: OrderedDict[RequestKey, tuple[float, PreparedRequest]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, key: RequestKey) -> PreparedRequest | None:
        self.remove_expired()
        _, prepared = self._requests.get(key, (0.0, None))
        return prepared

    def put(self, key: RequestKey, prepared: PreparedRequest) -> None:
        self._requests[key] = self._clock(), prepared
        self._requests.move_to_end(key)
        self.remove_expired()
        if len(self._requests) > self._max_requests:
            self._requests.popitem(last=False)

    def remove(self, key: RequestKey) -> None:
        self._requests.pop(key, None)

    def remove_expired(self) -> None:
        """Remove requests that were not retried for an hour, so that no key outlives its pod for long."""
        expired = self._clock() - _EXPIRES_AFTER_S
        while self._requests and next(iter(self._requests.values()))[0] < expired:
            self._requests.popitem(last=False)
