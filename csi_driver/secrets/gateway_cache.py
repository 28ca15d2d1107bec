"""The Gateways of a namespace: a watch of their metadata, and a read of each one that requests certificates."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import structlog

from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.cache_shares import CacheShares, namespace_owner
from csi_driver.kube.client import ApiError, InvalidApiResponse
from csi_driver.kube.reflector import Reflector, WatchedResource
from csi_driver.kube.tls_secrets.source_objects import TLS_ACME, TLSObject
from csi_driver.secrets.source_table import SourceCache, SourceKey, key_of

log = structlog.get_logger(__name__)

MAX_GATEWAYS = 1000
"""Of a namespace that request certificates."""
_READ_INTERVAL_S = 0.1  # between reads of one namespace: a tenant can change its Gateways more often
_RETRY = Backoff(1.0, 60.0)  # a Gateway that is too large stays so

ReadGateway = Callable[[TLSObject], Awaitable[TLSObject | None]]


@dataclass(eq=False)
class GatewayCache:
    """Implements :class:`csi_driver.kube.reflector.ObjectCache` for metadata; ``sources`` gets the complete Gateways."""

    sources: SourceCache[TLSObject]
    read: ReadGateway
    _wanted: dict[SourceKey, TLSObject] = field(default_factory=dict)  # Gateways that request certificates
    _unread: set[SourceKey] = field(default_factory=set)  # those of them that have never been read
    _invalid: set[SourceKey] = field(default_factory=set)  # those whose last read had an invalid response
    _changed: dict[SourceKey, None] = field(default_factory=dict)  # those to read, the next one first
    _failures: dict[SourceKey, int] = field(default_factory=dict)  # consecutive ones
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def shares(self) -> CacheShares:
        return self.sources.shares

    @property
    def complete(self) -> bool:
        """Whether each known Gateway has been read, if only in an earlier version."""
        return not self._unread

    @property
    def stuck(self) -> bool:
        """Whether a person must first change each Gateway that has not been read."""
        return self._unread <= self._invalid

    def put(self, item: TLSObject) -> Hashable | None:
        key = key_of(item.target)
        if item.annotations.get(TLS_ACME) != "true":
            self.remove(item)
            return key
        if key not in self._wanted:
            if len(self._wanted) >= MAX_GATEWAYS:
                self._refuse(item)
                return None
            self._unread.add(key)
        self._wanted[key] = item
        self._changed[key] = None
        self._invalid.discard(key)
        self._wake.set()
        return key

    def remove(self, item: TLSObject) -> None:
        self._forget(key_of(item.target))
        self.sources.remove(item)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        for key in [key for key in self._wanted if key not in keys]:
            self._forget(key)
        self.sources.retain(keys)

    async def run(self) -> None:
        """Read each changed Gateway, one after another."""
        while True:
            self._wake.clear()
            while self._changed:
                await self._read_next()
                await asyncio.sleep(_READ_INTERVAL_S)
            await self._wake.wait()

    async def _read_next(self) -> None:
        key = next(iter(self._changed))
        del self._changed[key]
        item, error = self._wanted[key], None
        try:
            found = await self.read(item)
        except CertmountError as problem:
            found, error = None, problem
        if self._wanted.get(key) is not item:
            return  # changed or deleted meanwhile
        if found is None:
            # Also if it does not exist: the watch reports its deletion, and the API server can be starting.
            self._retry_later(key, item, error)
            return
        self.sources.put(found)
        self._unread.discard(key)
        self._invalid.discard(key)
        if self._failures.pop(key, 0):
            log.info("Gateway read", gateway=str(item.target))

    def _retry_later(self, key: SourceKey, item: TLSObject, error: CertmountError | None) -> None:
        """Read a Gateway again; until then, its Secrets remain unchanged."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        if isinstance(error, InvalidApiResponse):
            self._invalid.add(key)
        if failures == 1:
            log.warning("Gateway not read", gateway=str(item.target), error=str(error or "it does not exist"))
        after_s = error.retry_after_s if isinstance(error, ApiError) else None
        asyncio.get_running_loop().call_later(max(_RETRY.delay_s(failures), after_s or 0.0), self._retry, key, item)

    def _retry(self, key: SourceKey, item: TLSObject) -> None:
        if self._wanted.get(key) is item:
            self._changed[key] = None
            self._wake.set()

    def _refuse(self, item: TLSObject) -> None:
        owner = namespace_owner(item.target.namespace)
        problem = f"has more than {MAX_GATEWAYS} Gateways that request certificates, so certmount ignores the others"
        error = CertmountError(Reason.SHARE_EXCEEDED, Fault(owner, problem))
        log.warning("Gateway ignored", gateway=str(item.target), error=str(error))
        self.shares.record(owner, error)

    def _forget(self, key: SourceKey) -> None:
        if self._wanted.pop(key, None) is not None:
            self.shares.make_room()
        self._unread.discard(key)
        self._invalid.discard(key)
        self._changed.pop(key, None)
        self._failures.pop(key, None)


@dataclass(frozen=True, eq=False)
class GatewayWatch:
    """Both parts, with the attributes of a reflector."""

    reflector: Reflector[TLSObject]
    cache: GatewayCache

    @property
    def synced(self) -> bool:
        return self.reflector.synced and self.cache.complete

    @property
    def stuck(self) -> bool:
        return self.reflector.synced and self.cache.stuck

    @property
    def failing_since(self) -> float | None:
        return self.reflector.failing_since

    @property
    def resource(self) -> WatchedResource[TLSObject]:
        return self.reflector.resource

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.reflector.run(), name="watch")
            tasks.create_task(self.cache.run(), name="reads")
