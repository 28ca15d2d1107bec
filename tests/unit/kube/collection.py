"""A resource of the fake API server that can be listed in pages and watched from a version."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

Json = dict[str, Any]
_NEVER_S = 30.0


class Collection:
    """Objects by name, with a history for watches."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        self.version = 1000
        self.compacted = 0
        """Watches from an older version expire."""
        self.queries: list[dict[str, str]] = []
        self.accepts: list[str] = []
        self.watching = 0
        self.breaking = False
        """True to end watches at once."""
        self._history: list[tuple[int, bytes]] = []
        self._changed = asyncio.Event()

    def put(self, item: Json) -> None:
        """Create or replace an object by namespace and name."""
        metadata = item["metadata"]
        key = f"{metadata.get('namespace', '')}/{metadata['name']}"
        kind = "MODIFIED" if key in self.objects else "ADDED"
        self.version += 1
        self.objects[key] = {
            **item,
            "metadata": {"uid": f"uid-{key}", **metadata, "resourceVersion": str(self.version)},
        }
        self._tell(kind, self.objects[key])

    def remove(self, key: str) -> None:
        self.version += 1
        gone = self.objects.pop(key)
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._tell("DELETED", gone)

    def bookmark(self) -> None:
        """Send a bookmark, as the API server does each minute."""
        self.version += 1
        self._tell("BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}})

    def compact(self) -> None:
        """Drop the history, so that clients must list again."""
        self.version += 1
        self.compacted = self.version
        self._history.clear()

    def send(self, line: bytes) -> None:
        """Send a line to the watchers."""
        self.version += 1
        self._history.append((self.version, line))
        self._wake()

    def _tell(self, kind: str, item: Json) -> None:
        self._history.append((self.version, json.dumps({"type": kind, "object": item}).encode()))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.queries.append(query)
        self.accepts.append(request.headers.get("Accept", ""))
        return await self._watch(request, query) if "watch" in query else self._list(query)

    def _list(self, query: dict[str, str]) -> web.Response:
        start, version = (int(part) for part in query.get("continue", f"0.{self.version}").split("."))
        if version < self.compacted:
            return web.json_response({"kind": "Status", "code": 410, "message": "expired"}, status=410)
        end = start + int(query["limit"])
        items = list(self.objects.values())
        metadata = {"resourceVersion": str(version)}
        if end < len(items):
            metadata["continue"] = f"{end}.{version}"
        # A real API server also sends null for an empty list of metadata.
        return web.json_response({"kind": "PodList", "items": items[start:end] or None, "metadata": metadata})

    async def _watch(self, request: web.Request, query: dict[str, str]) -> web.StreamResponse:
        known = int(query["resourceVersion"])
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if self.breaking:
            return response
        if known < self.compacted:
            await response.write(b'{"type": "ERROR", "object": {"kind": "Status", "code": 410}}\n')
            return response
        self.watching += 1
        try:
            async with asyncio.timeout(min(int(query["timeoutSeconds"]), _NEVER_S)):
                while True:
                    changed = self._changed
                    for version, line in list(self._history):
                        if version > known:
                            known = version
                            await response.write(line + b"\n")
                    if changed is self._changed:
                        await changed.wait()
        except TimeoutError:
            return response
        finally:
            self.watching -= 1
