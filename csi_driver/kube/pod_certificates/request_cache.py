"""A bounded cache of the PodCertificateRequests that are not finished."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Set as AbstractSet

from csi_driver.core.cluster.pod_certificates import PodCertificateRequest
from csi_driver.kube.cache_shares import PAIR_BYTES, CacheShares, namespace_owner

MAX_REQUEST_CACHE_BYTES = 32 * 2**20
"""About the memory of the cache. One namespace gets at most half of it; its other requests wait until some are finished."""
_REQUEST_BYTES = 2048  # of a request in addition to its contents


class RequestCache:
    """The unfinished requests by namespace and name. ``changed`` is called for new and changed ones.

    Implements :class:`csi_driver.kube.reflector.ObjectCache`.
    """

    def __init__(
        self, changed: Callable[[PodCertificateRequest], None], capacity: int = MAX_REQUEST_CACHE_BYTES
    ) -> None:
        self.shares = CacheShares("bytes of PodCertificateRequests", capacity)
        self._known: dict[str, PodCertificateRequest] = {}
        self._changed = changed

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> PodCertificateRequest | None:
        return self._known.get(key)

    def put(self, item: PodCertificateRequest) -> Hashable | None:
        if item == self._known.get(item.key):
            return item.key
        self._drop(item.key)
        if item.finished:  # Kubernetes keeps it for a quarter of an hour
            return item.key
        if not self.shares.take(namespace_owner(item.namespace), _size(item)):
            return None
        self._known[item.key] = item
        self._changed(item)
        return item.key

    def remove(self, item: PodCertificateRequest) -> None:
        self._drop(item.key)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        for key in [key for key in self._known if key not in keys]:
            self._drop(key)

    def _drop(self, key: str) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self.shares.give_back(namespace_owner(known.namespace), _size(known))


def _size(request: PodCertificateRequest) -> int:
    annotations = sum(PAIR_BYTES + len(key) + len(value) for key, value in (request.annotations or {}).items())
    return _REQUEST_BYTES + len(request.csr) + len(request.public_key) + annotations
