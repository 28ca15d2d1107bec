"""List and watch one resource in the whole cluster, as client-go's Reflector does."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol, TypeVar

import aiohttp
import structlog
from aiohttp.http_exceptions import BadHttpMessage
from kubernetes.aio import client

from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.client import ApiError, call_api
from csi_driver.kube.json_requests import open_response, request_json
from csi_driver.kube.metadata import InvalidObject, Json

log = structlog.get_logger(__name__)

_PAGE_SIZE = 500
_METADATA = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"
_GONE = 410
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class WatchedResource:
    """A resource to watch in all namespaces."""

    name: str  # the plural, for logs and errors
    path: str
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


class ObjectCache(Protocol):
    """Receives the objects. Its methods raise InvalidObject."""

    def put(self, item: Json) -> Hashable:
        """Add or replace an object; return its key."""

    def remove(self, item: Json) -> None:
        """Remove a deleted object."""

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        """Remove all objects whose keys are not in a complete list."""


class _Expired(Exception):
    """The API server no longer has the changes since the known resourceVersion (HTTP 410)."""


class Reflector:
    """Keeps a cache current. It retries after every failure; ``failing_since`` shows an ongoing one."""

    def __init__(
        self,
        api: client.ApiClient,
        resource: WatchedResource,
        cache: ObjectCache,
        *,
        timings: WatchTimings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._api = api
        self.resource = resource
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
                self._record_failure(str(error), None)
            except CertmountError as error:
                if isinstance(error, ApiError) and error.status == _GONE:
                    self._version = ""
                self._record_failure(str(error), error.retry_after_s if isinstance(error, ApiError) else None)
            await self._sleep(self._delay_s())

    async def _list(self) -> None:
        """Read all objects, page by page, and remove all others from the cache."""
        keys: set[Hashable] = set()
        query = {"limit": str(_PAGE_SIZE), **self._selectors()}
        path, headers, timeout_s = self.resource.path, self._accept("List"), self._timings.page
        while True:
            call = request_json(self._api, "GET", path, query=query, headers=headers, timeout_s=timeout_s)
            items, metadata = _list_content(await self._call(call))
            keys.update(self._put(item) for item in items)
            if not metadata.get("continue"):
                break
            query["continue"] = str(metadata["continue"])
        self._cache.retain(keys)
        self._version = str(metadata.get("resourceVersion") or "")
        self.synced = True
        self._record_success()

    async def _watch(self) -> None:
        """Apply the changes since the known version until the API server ends the watch."""
        seconds = self._timings.watch * random.uniform(0.8, 1.2)  # noqa: S311  # not a secret
        query = {
            "watch": "true",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, round(seconds))),
            **self._selectors(),
        }
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._timings.page, sock_read=self._timings.silence)
        path, headers = self.resource.path, self._accept("")
        start = self._clock()

        async def read_events() -> bool:
            async with open_response(self._api, "GET", path, query=query, headers=headers, limits=limits) as response:
                self._record_success()
                return await self._read_events(response.content)

        received = await self._call(read_events())
        # Back off if a proxy between the authority and the API server cuts watches off early.
        long_enough = self._clock() - start >= min(seconds, self._timings.silence) / 2
        self._failures = 0 if received or long_enough else self._failures + 1

    async def _read_events(self, content: aiohttp.StreamReader) -> bool:
        """Apply events until the stream ends; return whether there was one."""
        received = False
        while True:
            try:
                line = await content.readline()
            except TimeoutError:
                log.debug("watch timed out without data", resource=self.resource.name)
                return received
            except (ValueError, BadHttpMessage):
                # The line exceeds aiohttp's buffer of several MiB; etcd stores no object that large.
                raise InvalidObject(f"{self.resource.name}: the API server sent a line that is too long") from None
            if not line:
                return received
            self._apply(line)
            self._failures = 0
            received = True

    def _apply(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind, item = event["type"], event["object"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InvalidObject(f"{self.resource.name}: the API server sent an invalid watch event") from None
        if kind == "ERROR":
            code = item.get("code") if isinstance(item, dict) else None
            if code == _GONE:
                raise _Expired
            raise InvalidObject(f"{self.resource.name}: the API server ended the watch with status {code}")
        if kind in ("ADDED", "MODIFIED"):
            self._put(item)
        elif kind == "DELETED" and isinstance(item, dict):
            self._cache.remove(item)
        metadata = item.get("metadata") if isinstance(item, dict) else None
        if isinstance(metadata, dict) and isinstance(metadata.get("resourceVersion"), str):
            self._version = metadata["resourceVersion"]

    def _put(self, item: object) -> Hashable:
        if not isinstance(item, dict):
            raise InvalidObject(f"{self.resource.name}: the API server sent a value that is not an object")
        return self._cache.put(item)

    def _selectors(self) -> dict[str, str]:
        selectors = {"fieldSelector": self.resource.field_selector, "labelSelector": self.resource.label_selector}
        return {name: selector for name, selector in selectors.items() if selector}

    def _accept(self, suffix: str) -> dict[str, str]:
        return {"Accept": _METADATA.format(suffix)} if self.resource.metadata_only else {}

    async def _call(self, call: Awaitable[_T]) -> _T:
        return await call_api(call, Reason.TOKEN_REVIEW_UNAVAILABLE, self.resource.name)

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


def _list_content(page: Json) -> tuple[list[object], Json]:
    items, metadata = page.get("items"), page.get("metadata")
    if items is None:
        items = []  # the API server sends null for an empty list of PartialObjectMetadata
    if not str(page.get("kind")).endswith("List") or not isinstance(items, list) or not isinstance(metadata, dict):
        raise InvalidObject("the API server sent a response that is not a list")
    return items, metadata
