"""A resource of the fake API server that can be listed in pages and watched from a version."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from csi_driver._proto.kubernetes_pb2 import Status
from tests.support.api_objects import encode, encode_list, envelope, frame

Json = dict[str, Any]
_NEVER_S = 30.0


def status_response(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "message": message, "code": code}, status=code)


class Collection:
    """Objects by name, with a history for watches."""

    def __init__(self, kind: str = "") -> None:
        """Without a kind, only the metadata of objects are sent."""
        self.kind = kind
        self.objects: dict[str, Json] = {}
        self.version = 1000
        self.compacted = 0  # watches from an older version expire
        self.queries: list[dict[str, str]] = []
        self.accepts: list[str] = []
        self.encodings: list[str] = []
        self.watching = 0
        self.breaking = False  # true to end watches at once
        self._history: list[tuple[int, bytes]] = []
        self._changed = asyncio.Event()

    def put(self, item: Json) -> None:
        metadata = item["metadata"]
        key = f"{metadata.get('namespace', '')}/{metadata['name']}"
        kind = "MODIFIED" if key in self.objects else "ADDED"
        self.version += 1
        known = {"uid": f"uid-{key}", **metadata, "resourceVersion": str(self.version)}
        self.objects[key] = {**item, "metadata": known}
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

    def send(self, data: bytes) -> None:
        self.version += 1
        self._history.append((self.version, data))
        self._wake()

    def _tell(self, kind: str, item: Json) -> None:
        self._history.append((self.version, frame(kind, encode(item, self.kind))))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.queries.append(query)
        self.accepts.append(request.headers.get("Accept", ""))
        self.encodings.append(request.headers.get("Accept-Encoding", ""))
        return await self._watch(request, query) if "watch" in query else self._list(query)

    def _list(self, query: dict[str, str]) -> web.Response:
        start, version = (int(part) for part in query.get("continue", f"0.{self.version}").split("."))
        if version < self.compacted:
            return web.Response(status=410, body=envelope(Status(code=410).SerializeToString(), "Status"))
        end = start + int(query["limit"])
        items = list(self.objects.values())
        token = f"{end}.{version}" if end < len(items) else ""
        page = [encode(item, self.kind) for item in items[start:end]]
        return web.Response(body=encode_list(page, str(version), token))

    async def _watch(self, request: web.Request, query: dict[str, str]) -> web.StreamResponse:
        known = int(query["resourceVersion"])
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if self.breaking:
            return response
        if known < self.compacted:
            await response.write(frame("ERROR", Status(code=410).SerializeToString()))
            return response
        self.watching += 1
        try:
            async with asyncio.timeout(min(int(query["timeoutSeconds"]), _NEVER_S)):
                while True:
                    changed = self._changed
                    for version, data in list(self._history):
                        if version > known:
                            known = version
                            await response.write(data)
                    if changed is self._changed:
                        await changed.wait()
        except TimeoutError:
            return response
        finally:
            self.watching -= 1
