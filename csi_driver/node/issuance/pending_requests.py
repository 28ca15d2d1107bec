"""Keys and CSRs of requests that have no final result yet.

A retry uses the same key and CSR, so that a slow issuer gets one order. The kubelet ends a call after two minutes and then
removes the volume, but an order at a public CA can take longer. Therefore keys outlive the call and the volume. They are
kept in memory only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.shares import FairShares
from csi_driver.node.issuance.certificate_request import RequestKey
from csi_driver.node.issuance.shared_cache import SharedCache

MAX_PENDING_REQUESTS = 1_000  # ten times the volumes of a busy node
_PLACE_BYTES = 8 * 1024
"""A CSR with long names takes several places: names are in the CSR and in the key of the cache, up to 120 KiB together."""
_EXPIRES_AFTER_S = 3600.0
"""The kubelet retries within minutes. A request without a retry for this long belongs to a deleted pod."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A private key and the CSR (PKCS #10, DER) that it has signed."""

    key: PrivateKey = field(repr=False)
    csr: bytes = field(repr=False)

    @property
    def places(self) -> int:
        return 1 + len(self.csr) // _PLACE_BYTES


class PendingRequests:
    """Prepared requests. ``clock`` returns seconds of a monotonic clock."""

    def __init__(self, clock: Callable[[], float], max_requests: int = MAX_PENDING_REQUESTS) -> None:
        self._clock = clock
        shares = FairShares("keys of pending requests on this node", max_requests)
        self._requests: SharedCache[tuple[float, PreparedRequest]] = SharedCache(
            shares, lambda stored: stored[1].places
        )

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, key: RequestKey) -> PreparedRequest | None:
        self.remove_expired()
        found = self._requests.get(key)
        return found[1] if found is not None else None

    def put(self, key: RequestKey, prepared: PreparedRequest) -> None:
        self.remove_expired()
        self._requests.put(key, (self._clock(), prepared))

    def remove(self, key: RequestKey) -> None:
        self._requests.remove(key)

    def remove_expired(self) -> None:
        """Remove requests that were not retried for an hour, so that no key outlives its pod for long."""
        expired = self._clock() - _EXPIRES_AFTER_S
        while (oldest := self._requests.oldest()) is not None and oldest[1][0] < expired:
            self._requests.remove(oldest[0])
