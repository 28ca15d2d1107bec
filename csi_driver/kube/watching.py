"""A reflector (the field's word): a list and the watch that follows it, for one resource of the whole cluster, for ever."""

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

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.client import ApiError, answered
from csi_driver.kube.metadata import BadObject, Json
from csi_driver.kube.requests import ask, opened

log = structlog.get_logger(__name__)

_PAGE = 500
_METADATA = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"
_GONE = 410
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Resource:
    """What is watched, in all namespaces."""

    name: str
    """In the plural, for people."""
    path: str
    metadata_only: bool = False
    """Then the API server leaves out spec and status (meta.k8s.io/v1 PartialObjectMetadata)."""
    field_selector: str = ""
    label_selector: str = ""


@dataclass(frozen=True, slots=True)
class Pace:
    """How patient a reflector is, in seconds."""

    watch: float = 280.0
    """After which the API server ends a watch and a new one begins; moved by rng, so that replicas don't do so together."""
    silence: float = 100.0
    """A watch that says nothing for so long may be dead, and is replaced: that costs one request where all was quiet."""
    page: float = 30.0
    first_retry: float = 0.5
    longest_retry: float = 15.0


class Sink(Protocol):
    """Where the objects go. Raises BadObject for one that it can't read."""

    def put(self, item: Json) -> Hashable:
        """Takes an object that is new or has changed; gives the key under which it is kept."""

    def remove(self, item: Json) -> None:
        """The object is gone."""

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        """What is not among the keys is gone: a list has told of all there is."""


class _Expired(Exception):
    """The API server no longer knows what has happened since (HTTP 410)."""


class Reflector:
    """Keeps a sink as the cluster is. Whatever happens, it goes on trying; ``failing_since`` tells of it."""

    def __init__(
        self,
        api: client.ApiClient,
        resource: Resource,
        sink: Sink,
        *,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._api = api
        self.resource = resource
        self._sink = sink
        self._pace = pace or Pace()
        self._clock = clock
        self._sleep = sleep
        self._version = ""
        self._failures = 0
        self._retry_after_s = 0.0
        self.synced = False
        """True once the sink has held all there is."""
        self.failing_since: float | None = None
        """By the clock; None while the sink is kept up to date."""

    async def run(self) -> None:
        """Follows the cluster for ever."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except _Expired:
                self._version = ""
                self._failures += 1
                log.info("listed again, as too much has happened since", resource=self.resource.name)
            except BadObject as error:
                # From the same version the same object would come again.
                self._version = ""
                self._failed(str(error), None)
            except CertmountError as error:
                if isinstance(error, ApiError) and error.status == _GONE:
                    self._version = ""
                self._failed(str(error), error.retry_after_s if isinstance(error, ApiError) else None)
            await self._sleep(self._delay())

    async def _list(self) -> None:
        """Reads all objects, page by page, and drops what is no more."""
        keys: set[Hashable] = set()
        query = {"limit": str(_PAGE), **self._selection()}
        while True:
            page = await self._answered(
                ask(
                    self._api,
                    "GET",
                    self.resource.path,
                    query=query,
                    headers=self._accepted("List"),
                    timeout_s=self._pace.page,
                )
            )
            items, metadata = _content(page)
            keys.update(self._put(item) for item in items)
            if not metadata.get("continue"):
                break
            query["continue"] = str(metadata["continue"])
        self._sink.retain(keys)
        self._version = str(metadata.get("resourceVersion") or "")
        self.synced = True
        self._works()

    async def _watch(self) -> None:
        """Follows what happens from the known version on, until the API server ends it."""
        seconds = self._pace.watch * random.uniform(0.8, 1.2)  # noqa: S311  # not a secret
        query = {
            "watch": "true",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, round(seconds))),
            **self._selection(),
        }
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._pace.page, sock_read=self._pace.silence)
        path, headers = self.resource.path, self._accepted("")
        begin = self._clock()

        async def follow() -> bool:
            async with opened(self._api, "GET", path, query=query, headers=headers, limits=limits) as answer:
                self._works()
                return await self._read(answer.content)

        some = await self._answered(follow())
        # Something between us and the API server may cut watches off: then it is asked less often.
        lasted = self._clock() - begin >= min(seconds, self._pace.silence) / 2
        self._failures = 0 if some or lasted else self._failures + 1

    async def _read(self, content: aiohttp.StreamReader) -> bool:
        """Takes one event after the other; gives whether there was one."""
        some = False
        while True:
            try:
                line = await content.readline()
            except TimeoutError:
                log.debug("a watch was silent for too long", resource=self.resource.name)
                return some
            except (ValueError, BadHttpMessage):
                # Longer than aiohttp's buffer of some MiB; etcd keeps no object that long.
                raise BadObject(f"{self.resource.name}: the API server sends a line without an end") from None
            if not line:
                return some
            self._take(line)
            self._failures = 0
            some = True

    def _take(self, line: bytes) -> None:
        """One event of a watch: a JSON object in one line."""
        try:
            event = json.loads(line)
            kind, item = event["type"], event["object"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise BadObject(f"{self.resource.name}: the API server sends what is no watch event") from None
        if kind == "ERROR":
            code = item.get("code") if isinstance(item, dict) else None
            if code == _GONE:
                raise _Expired
            raise BadObject(f"{self.resource.name}: the API server ends the watch with status {code}")
        if kind in ("ADDED", "MODIFIED"):
            self._put(item)
        elif kind == "DELETED" and isinstance(item, dict):
            self._sink.remove(item)
        metadata = item.get("metadata") if isinstance(item, dict) else None
        if isinstance(metadata, dict) and isinstance(metadata.get("resourceVersion"), str):
            self._version = metadata["resourceVersion"]

    def _put(self, item: object) -> Hashable:
        if not isinstance(item, dict):
            raise BadObject(f"{self.resource.name}: the API server sends something that is no object")
        return self._sink.put(item)

    def _selection(self) -> dict[str, str]:
        selectors = {"fieldSelector": self.resource.field_selector, "labelSelector": self.resource.label_selector}
        return {name: selector for name, selector in selectors.items() if selector}

    def _accepted(self, suffix: str) -> dict[str, str]:
        return {"Accept": _METADATA.format(suffix)} if self.resource.metadata_only else {}

    async def _answered(self, call: Awaitable[_T]) -> _T:
        return await answered(call, Reason.TOKEN_REVIEW_UNAVAILABLE, self.resource.name)

    def _works(self) -> None:
        if self.failing_since is not None:
            log.info("followed again", resource=self.resource.name, after_s=round(self._clock() - self.failing_since))
        self.failing_since = None

    def _failed(self, error: str, retry_after_s: float | None) -> None:
        self._failures += 1
        self._retry_after_s = retry_after_s or 0.0
        if self.failing_since is None:
            self.failing_since = self._clock()
            log.warning("not followed", resource=self.resource.name, error=error)

    def _delay(self) -> float:
        """Doubled with each failure; moved by rng, so that an API server that comes back is not met by all at once."""
        longest = min(self._pace.first_retry * 2.0 ** min(self._failures, 16), self._pace.longest_retry)
        delay = max(longest * random.uniform(0.5, 1.0), self._retry_after_s)  # noqa: S311  # not a secret
        self._retry_after_s = 0.0
        return delay


def _content(page: Json) -> tuple[list[object], Json]:
    """A list's objects and its own metadata (meta.k8s.io/v1 ListMeta); raises BadObject."""
    items, metadata = page.get("items"), page.get("metadata")
    if items is None:
        items = []  # so the API server writes an empty list of metadata
    if not str(page.get("kind")).endswith("List") or not isinstance(items, list) or not isinstance(metadata, dict):
        raise BadObject("the API server's answer is no list")
    return items, metadata
