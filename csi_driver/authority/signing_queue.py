"""The queue of a signer of Kubernetes requests: each request once, and the tenants take turns and have shares."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from csi_driver.core.backoff import Backoff
from csi_driver.core.shares import FairShares

WORKERS = 16
"""Requests in progress at the same time. A single tenant has half of them: more would only wait for the API server."""
_MAX_FINISHED = 10_000
_RETRY = Backoff(1, 60)


class SignableRequest(Protocol):
    """A request on the API server. An object that is created again has another UID."""

    @property
    def key(self) -> str: ...
    @property
    def uid(self) -> str: ...
    @property
    def turn(self) -> str:
        """The tenant that takes turns with others."""


_Request = TypeVar("_Request", bound=SignableRequest)


class SigningQueue(Generic[_Request]):
    """Keys of requests to process. ``find`` returns a request as it is now, or None if it was deleted or is finished."""

    def __init__(self, find: Callable[[str], _Request | None]) -> None:
        self._find = find
        self._waiting: dict[str, dict[str, None]] = {}  # by tenant
        self._in_progress: dict[str, str] = {}  # the tenant of each key
        self._shares = FairShares("requests in progress", WORKERS)
        self._failures: dict[str, int] = {}
        self._retries: dict[str, asyncio.TimerHandle] = {}
        """One timer for each key: a request that is changed while it waits must not be retried once for each change."""
        self._finished: OrderedDict[str, None] = OrderedDict()
        """UIDs of the latest finished requests. The watch can still deliver an older version, which must not be signed again."""
        self._changed = asyncio.Event()

    def add(self, request: _Request) -> None:
        """Process the request, unless it is already waiting or finished."""
        if request.uid not in self._finished:
            self._add_key(request.turn, request.key)

    def _add_key(self, turn: str, key: str) -> None:
        self._waiting.setdefault(turn, {})[key] = None
        self._changed.set()

    async def run_workers(self, process: Callable[[_Request, bool], Awaitable[bool]]) -> None:
        """Call ``process`` with each request, and whether it is a retry; retry it if the result is False."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WORKERS):
                tasks.create_task(self._work(process))

    async def _work(self, process: Callable[[_Request, bool], Awaitable[bool]]) -> None:
        while True:
            key = await self._take()
            try:
                request = self._find(key)
                # It may have been deleted, or finished while the watch delivered a change of the signer itself.
                if request is None or request.uid in self._finished:
                    self._failures.pop(key, None)
                elif await process(request, key in self._failures):
                    self._finish(request)
                else:
                    self._retry_later(request)
            finally:
                self._shares.give_back((self._in_progress.pop(key),))
                self._changed.set()  # it may have been added again in the meantime

    async def _take(self) -> str:
        while (key := self.start_next()) is None:
            self._changed.clear()
            await self._changed.wait()
        return key

    def start_next(self) -> str | None:
        """Return the key that is next, which is in progress now, or None."""
        for tenant, keys in self._waiting.items():
            key = next((key for key in keys if key not in self._in_progress), None)
            # Without a share, one tenant's requests could hold all workers while they wait for a server.
            if key is not None and self._shares.try_take((tenant,)):
                self._in_progress[key] = tenant
                del self._waiting[tenant], keys[key]
                if keys:
                    self._waiting[tenant] = keys  # the last one now
                return key
        return None

    def _finish(self, request: _Request) -> None:
        self._failures.pop(request.key, None)
        self._finished[request.uid] = None
        if len(self._finished) > _MAX_FINISHED:
            self._finished.popitem(last=False)

    def _retry_later(self, request: _Request) -> None:
        self._failures[request.key] = failures = self._failures.get(request.key, 0) + 1
        if (earlier := self._retries.get(request.key)) is not None:
            earlier.cancel()
        # The timer holds no request: requests that were deleted in the meantime must take no memory.
        self._retries[request.key] = asyncio.get_running_loop().call_later(
            _RETRY.delay_s(failures), self._retry, request.turn, request.key
        )

    def _retry(self, turn: str, key: str) -> None:
        del self._retries[key]
        self._add_key(turn, key)
