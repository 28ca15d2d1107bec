"""Read all objects of a resource, page by page and one object at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import aiohttp
import structlog

from csi_driver._proto.kubernetes_pb2 import ListMeta
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import open_response
from csi_driver.kube.metadata import InvalidObject
from csi_driver.kube.response_stream import MAX_OBJECT_BYTES, PROTOBUF, read_list

log = structlog.get_logger(__name__)

_PAGE_SIZE = 250  # objects; the API server holds a page in memory
MAX_PAGES = 2000


async def list_pages(
    api: Api,
    path: str,
    put: Callable[[bytes], object],
    *,
    query: Mapping[str, str] | None = None,
    accept: str = PROTOBUF,
    timeout_s: float = 30.0,
) -> str:
    """Pass the bytes of each object to ``put``; return the resourceVersion of the list.

    An object that is too large is omitted. Raises InvalidObject, and the exceptions of the client.
    """
    page = {**(query or {}), "limit": str(_PAGE_SIZE)}
    # The API server itself ends a request after a minute.
    limits = aiohttp.ClientTimeout(total=2 * timeout_s, sock_connect=timeout_s, sock_read=timeout_s)
    too_large = 0
    for _ in range(MAX_PAGES):
        headers = {"Accept": accept}
        metadata = None
        async with open_response(api, "GET", path, query=page, headers=headers, limits=limits) as response:
            async for part in read_list(response.content):
                if isinstance(part, ListMeta):
                    metadata = part
                elif part is None:
                    too_large += 1
                else:
                    put(part)
        if metadata is None:
            raise InvalidObject("the API server sent a list without metadata")
        if not metadata.continue_token:
            if too_large:
                log.warning("large objects ignored", path=path, count=too_large, max_bytes=MAX_OBJECT_BYTES)
            return metadata.resource_version
        page["continue"] = metadata.continue_token
    raise InvalidObject("the list does not end")
