"""List and watch one resource in the whole cluster, as client-go's Reflector does."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import aiohttp
import structlog

from csi_driver._proto.kubernetes_pb2 import PartialObjectMetadata, Status, WatchEvent
from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.cache_shares import CacheShares
from csi_driver.kube.client import ApiError, call_api
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import open_response
from csi_driver.kube.lists import list_pages
from csi_driver.kube.metadata import InvalidObject
from csi_driver.kube.response_stream import PROTOBUF, decode, open_envelope, read_frames

log = structlog.get_logger(__name__)

_METADATA = f"{PROTOBUF};as=PartialObjectMetadata{{}};g=meta.k8s.io;v=v1"
_GONE = 410
_REFUSING_WATCH_S = 30.0  # a list restores the objects of an owner that uses less than its share again
_T = TypeVar("_T")
_Value = TypeVar("_Value")
_Stored_contra = TypeVar("_Stored_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class WatchedResource(Generic[_Value]):
    """A resource to watch in all namespaces."""

    name: str  # the plural, for logs and errors
    path: str
    read: Callable[[bytes], _Value]  # returns what the cache needs of an object in protobuf; raises InvalidObject
    metadata_only: bool = False  # True to receive no spec and status (meta.k8s.io/v1 PartialObjectMetadata)
    field_selector: str = ""
    label_selector: str = ""


@dataclass(frozen=True, slots=True)
class WatchTimings:
    """The timeouts and delays of a reflector, in seconds."""

    watch: float = 280.0  # of one watch request; jitter keeps replicas from reconnecting at the same time
    silence: float = 100.0  # a watch without data for this long may be dead, so the reflector reconnects
    page: float = 30.0
    first_retry: float = 0.5
    longest_retry: float = 15.0


class ObjectCache(Protocol[_Stored_contra]):
    """Receives the objects."""

    @property
    def shares(self) -> CacheShares: ...

    def put(self, item: _Stored_contra) -> Hashable | None:
        """Add or replace an object; return its key, or None if it exceeds its owner's share."""

    def remove(self, item: _Stored_contra) -> None:
        """Remove a deleted object."""

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        """Remove all objects whose keys are not in a complete list."""


class _Expired(Exception):
    """The API server no longer has the changes since the known resourceVersion (HTTP 410)."""


class Reflector(Generic[_Value]):
    """Keeps a cache current. It retries after every failure; ``failing_since`` shows an ongoing one."""

    def __init__(
        self,
        api: Api,
        resource: WatchedResource[_Value],
        cache: ObjectCache[_Value],
        *,
        timings: WatchTimings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        find_path: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        """``find_path`` returns the resource's path again before each retry of a failing watch: its API version can change."""
        self._api = api
        self.resource = resource
        self._path = resource.path
        self._find_path = find_path
        self._cache = cache
        self._timings = timings or WatchTimings()
        # The first delay follows a watch that ended normally.
        self._backoff = Backoff(self._timings.first_retry, self._timings.longest_retry)
        self._clock = clock
        self._sleep = sleep
        self._version = ""
        self._failures = 0
        self._retry_after_s = 0.0
        self.synced = False  # True after the first complete list
        self.failing_since: float | None = (
            None  # the clock's time of the first failure; None while the cache is current
        )

    async def run(self) -> None:
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except _Expired:
                self._version = ""
                self._failures += 1
                log.info("watch expired; listing again", resource=self.resource.name)
            except InvalidObject as error:
                # A watch from the same version would receive the same object again.
                self._version = ""
                self._record_failure(f"{self.resource.name}: {error}", None)
            except CertmountError as error:
                if isinstance(error, ApiError) and error.status == _GONE:
                    self._version = ""
                # Without the reason: a watch that is forbidden is not an unavailable API server.
                text = "; ".join(map(str, error.faults))
                self._record_failure(text, error.retry_after_s if isinstance(error, ApiError) else None)
            await self._sleep(self._delay_s())
            if self._find_path is not None and self.failing_since is not None:
                # A resourceVersion is valid in every API version, so the watch continues from the last one.
                self._path = await self._find_path()

    async def _list(self) -> None:
        """Read all objects, page by page, and remove all others from the cache."""
        keys: set[Hashable | None] = set()
        self._cache.shares.start_list()

        def put(data: bytes) -> None:
            keys.add(self._cache.put(self.resource.read(data)))

        pages = list_pages(
            self._api,
            self._path,
            put,
            query=self._selectors(),
            accept=self._accept("List"),
            timeout_s=self._timings.page,
        )
        version = await self._call(pages)
        self._cache.retain(keys)
        self._version = version
        self.synced = True
        self._record_success()
        if self._cache.shares.refusing:
            log.warning("objects ignored", resource=self.resource.name, errors=self._cache.shares.texts())

    async def _watch(self) -> None:
        """Apply the changes since the known version until the API server ends the watch."""
        longest = min(self._timings.watch, _REFUSING_WATCH_S) if self._cache.shares.refusing else self._timings.watch
        seconds = longest * random.uniform(0.8, 1.2)  # noqa: S311  # not a secret
        query = {
            "watch": "true",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, round(seconds))),
            **self._selectors(),
        }
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._timings.page, sock_read=self._timings.silence)
        path, headers = self._path, {"Accept": self._accept("")}
        start = self._clock()

        async def read_events() -> bool:
            async with open_response(self._api, "GET", path, query=query, headers=headers, limits=limits) as response:
                self._record_success()
                return await self._read_events(response.content)

        received = await self._call(read_events())
        # Back off if a proxy between the authority and the API server cuts watches off early.
        long_enough = self._clock() - start >= min(seconds, self._timings.silence) / 2
        self._failures = 0 if received or long_enough else self._failures + 1
        if self._cache.shares.has_room:
            self._version = ""

    async def _read_events(self, content: aiohttp.StreamReader) -> bool:
        """Apply events until the stream ends; return whether there was one."""
        received = False
        try:
            async for frame in read_frames(content):
                self._apply(decode(WatchEvent, frame))
                self._failures = 0
                received = True
        except TimeoutError:
            log.debug("watch timed out without data", resource=self.resource.name)
        return received

    def _apply(self, event: WatchEvent) -> None:
        item = open_envelope(event.object.raw)
        if event.type == "ERROR":
            code = decode(Status, item.raw).code
            if code == _GONE:
                raise _Expired
            raise InvalidObject(f"the API server ended the watch with status {code}")
        if event.type in ("ADDED", "MODIFIED"):
            self._cache.put(self.resource.read(item.raw))
        elif event.type == "DELETED":
            self._cache.remove(self.resource.read(item.raw))
        version = decode(PartialObjectMetadata, item.raw).metadata.resource_version
        self._version = version or self._version

    def _selectors(self) -> dict[str, str]:
        selectors = {"fieldSelector": self.resource.field_selector, "labelSelector": self.resource.label_selector}
        return {name: selector for name, selector in selectors.items() if selector}

    def _accept(self, suffix: str) -> str:
        return _METADATA.format(suffix) if self.resource.metadata_only else PROTOBUF

    async def _call(self, call: Awaitable[_T]) -> _T:
        return await call_api(call, Reason.API_SERVER_UNAVAILABLE, self.resource.name)

    def _record_success(self) -> None:
        if self.failing_since is not None:
            after_s = round(self._clock() - self.failing_since)
            log.info("watch recovered", resource=self.resource.name, after_s=after_s)
        self.failing_since = None

    def _record_failure(self, error: str, retry_after_s: float | None) -> None:
        self._failures += 1
        self._retry_after_s = retry_after_s or 0.0
        if self.failing_since is None:
            self.failing_since = self._clock()
            log.warning("watch failed", resource=self.resource.name, error=error)

    def _delay_s(self) -> float:
        """Return the delay before the next request, with jitter so that replicas do not reconnect at the same time."""
        longest = self._backoff.delay_s(self._failures + 1)
        delay = max(longest * random.uniform(0.5, 1.0), self._retry_after_s)  # noqa: S311  # not a secret
        self._retry_after_s = 0.0
        return delay
