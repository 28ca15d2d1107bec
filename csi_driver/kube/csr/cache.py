"""A cache of CertificateSigningRequests by name, which can wait until a request is finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Set as AbstractSet

from csi_driver.core.cluster.csr import ClusterCSR
from csi_driver.core.identity import SERVICE_ACCOUNT_USER
from csi_driver.kube.cache_shares import PAIR_BYTES, CacheShares, namespace_owner
from csi_driver.kube.key_waiters import KeyWaiters

MAX_CSR_CACHE_BYTES = 32 * 2**20
"""About the memory of a cache. One namespace gets at most half of it; its other requests wait until some are finished."""
_CSR_BYTES = 2048  # of a request in addition to its contents


class CSRCache:
    """Implements :class:`csi_driver.kube.reflector.ObjectCache`. ``changed`` is called for new and changed requests."""

    def __init__(
        self,
        changed: Callable[[ClusterCSR], None] = lambda _: None,
        *,
        keep_finished: bool = True,
        capacity: int = MAX_CSR_CACHE_BYTES,
    ) -> None:
        """Without ``keep_finished``, finished requests take no memory. Kubernetes keeps them for an hour."""
        self.shares = CacheShares("bytes of CertificateSigningRequests", capacity)
        self._known: dict[str, ClusterCSR] = {}
        self._keep_finished = keep_finished
        self._changed = changed
        self._waiters = KeyWaiters()
        self._waiting: dict[str, int] = {}
        self._removed: set[str] = set()
        self.listed = asyncio.Event()  # set after the first complete list

    def __iter__(self) -> Iterator[ClusterCSR]:
        return iter(tuple(self._known.values()))

    def __len__(self) -> int:
        return len(self._known)

    def find(self, name: str) -> ClusterCSR | None:
        return self._known.get(name)

    def add(self, created: ClusterCSR) -> None:
        """Add a request that was just created, unless the watch has already reported a newer state."""
        if created.name not in self._known:
            self._store(created)

    def forget(self, name: str) -> None:
        """Drop a request that was just deleted, before the watch reports it."""
        self._drop(name)

    async def wait(self, name: str, seconds: float) -> ClusterCSR | None:
        """Return the request as soon as it is finished, or None after a timeout; raises KeyError if it is deleted."""
        self._waiting[name] = self._waiting.get(name, 0) + 1
        found: ClusterCSR | str | None = None
        try:
            found = await self._waiters.wait(name, lambda: self._outcome(name), seconds)
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]
                self._removed.discard(name)
        if isinstance(found, str):
            raise KeyError(name)
        return found

    def _outcome(self, name: str) -> ClusterCSR | str | None:
        """Return the finished request, only its name if it was deleted, or None."""
        known = self._known.get(name)
        if known is not None and known.finished:
            return known
        return name if name in self._removed else None

    def put(self, item: ClusterCSR) -> Hashable | None:
        before = self._known.get(item.name)
        if item == before:
            return item.name
        self._drop(item.name)
        if not (item.finished and not self._keep_finished) and not self._store(item):
            return None
        self._changed(item)
        self._waiters.notify(item.name)
        return item.name

    def remove(self, item: ClusterCSR) -> None:
        self._drop(item.name)
        if item.name in self._waiting:
            self._removed.add(item.name)
            self._waiters.notify(item.name)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        # A request that a task waits for can be newer than the list. If it was deleted, the wait times out.
        for name in [name for name in self._known if name not in keys and name not in self._waiting]:
            self._drop(name)
        self.listed.set()

    def _store(self, csr: ClusterCSR) -> bool:
        if not self.shares.take(_owner(csr), _size(csr)):
            return False
        self._known[csr.name] = csr
        return True

    def _drop(self, name: str) -> None:
        csr = self._known.pop(name, None)
        if csr is not None:
            self.shares.give_back(_owner(csr), _size(csr))


def _owner(csr: ClusterCSR) -> str:
    """Return the namespace of a service account, because a tenant can create many, or the requester."""
    namespace, separator, _ = csr.username.removeprefix(SERVICE_ACCOUNT_USER).partition(":")
    is_account = separator and csr.username.startswith(SERVICE_ACCOUNT_USER)
    return namespace_owner(namespace) if is_account else f"requester {csr.username}"


def _size(csr: ClusterCSR) -> int:
    """Return about how much memory the request takes."""
    conditions = sum(PAIR_BYTES + len(one.reason) + len(one.message) for one in csr.conditions)
    values = [
        csr.username,
        csr.signer,
        *csr.usages,
        *csr.labels.values(),
        *(text for texts in csr.extra.values() for text in texts),
    ]
    return (
        _CSR_BYTES
        + len(csr.request)
        + len(csr.certificate)
        + conditions
        + sum(PAIR_BYTES + len(text) for text in values)
    )
