"""Read objects of any kind in JSON."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from email.utils import parsedate_to_datetime

import aiohttp

from csi_driver.core.errors import Reason
from csi_driver.kube.admin.port_forward import get_from_pod
from csi_driver.kube.client import TIMEOUT_S, NotFound, call_api
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import open_response, request_bytes, request_json
from csi_driver.kube.metadata import Json

_PAGE_SIZE = 100
_MAX_PAGE_BYTES = 16 * 2**20  # a hundred pods of a DaemonSet need about 1 MiB
_MAX_TEXT_BYTES = 256 * 1024


class ObjectReader:
    """Reads objects. Each method raises CertmountError APIServerUnavailable; ApiError for an error response."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def find(self, path: str) -> Json | None:
        """Return an object, or None if it does not exist."""
        try:
            return await self._read(path, {})
        except NotFound:
            return None

    async def list(self, path: str, **query: str) -> AsyncIterator[Json]:
        """Yield the objects of a list, page by page."""
        page = {**query, "limit": str(_PAGE_SIZE)}
        while True:
            found = await self._read(path, page)
            for item in found.get("items") or ():
                yield item
            page["continue"] = str((found.get("metadata") or {}).get("continue") or "")
            if not page["continue"]:
                return

    async def _read(self, path: str, query: Mapping[str, str]) -> Json:
        call = request_json(self._api, "GET", path, query=query, max_bytes=_MAX_PAGE_BYTES)
        return await call_api(call, Reason.API_SERVER_UNAVAILABLE, path)

    async def text(self, path: str) -> str:
        call = request_bytes(self._api, "GET", path, headers={"Accept": "text/plain"}, max_bytes=_MAX_TEXT_BYTES)
        return (await call_api(call, Reason.API_SERVER_UNAVAILABLE, path)).decode(errors="replace")

    async def clock_difference_s(self) -> float:
        """Return by how many seconds the own clock is ahead of the API server's, at least. Its Date header has whole seconds."""

        async def read() -> float:
            limits = aiohttp.ClientTimeout(total=TIMEOUT_S)
            before = time.time()
            async with open_response(self._api, "GET", "/version", limits=limits) as response:
                date = parsedate_to_datetime(response.headers["Date"]).timestamp()
            return outside(date, before - 1, time.time())

        return await call_api(read(), Reason.API_SERVER_UNAVAILABLE, "/version")

    async def is_allowed(self, review: Json) -> bool:
        """Create a SubjectAccessReview, and return its result."""
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        call = request_json(self._api, "POST", path, body=review)
        status = (await call_api(call, Reason.API_SERVER_UNAVAILABLE, path)).get("status")
        return isinstance(status, dict) and status.get("allowed") is True

    async def page(self, namespace: str, pod: str, port: int, path: str, max_bytes: int, timeout_s: float) -> bytes:
        """Return a page that a program in a pod serves on its loopback interface."""
        return await get_from_pod(self._api, namespace, pod, port, path, max_bytes=max_bytes, timeout_s=timeout_s)


def outside(value: float, lowest: float, highest: float) -> float:
    """Return by how much the interval is above the value (positive) or below it (negative); 0 if it contains the value."""
    return max(lowest - value, 0.0) + min(highest - value, 0.0)
