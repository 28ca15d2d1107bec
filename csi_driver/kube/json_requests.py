"""API requests in plain JSON or protobuf, with bounded responses. Generated models would take most of the process's memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import TypeVar

import aiohttp
from google.protobuf.message import Message

from csi_driver.kube.client import TIMEOUT_S, InvalidResponse
from csi_driver.kube.connection import Api, ErrorResponse
from csi_driver.kube.metadata import InvalidObject, Json
from csi_driver.kube.response_stream import MAX_OBJECT_BYTES, PROTOBUF, decode, open_envelope

MAX_JSON_BYTES = 128 * 1024
"""Of a response in JSON. As Python objects, it takes up to 30 times as much memory."""
_MAX_ERROR_BYTES = 16 * 1024
_M = TypeVar("_M", bound=Message)
MERGE_PATCH = "application/merge-patch+json"  # RFC 7396
APPLY_PATCH = "application/apply-patch+yaml"  # of server-side apply; the client sends JSON, which is YAML


@contextlib.asynccontextmanager
async def open_response(
    api: Api,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | bytes | None = None,
    headers: Mapping[str, str] | None = None,
    limits: aiohttp.ClientTimeout,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Yield a response with an unread body; raises ErrorResponse for status >= 400, and aiohttp's exceptions."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    sent = {"Content-Type": "application/json", **(headers or {})}
    response = await api.request(method, path, query=query or {}, body=data, headers=sent, limits=limits)
    try:
        if response.status >= 400:
            text = await _read_start(response, _MAX_ERROR_BYTES)
            raise ErrorResponse(response.status, text.decode(errors="replace"), response.headers)
        yield response
    finally:
        response.close()  # does nothing if the body was read completely


async def request_json(
    api: Api,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | None = None,
    headers: Mapping[str, str] | None = None,
    max_bytes: int = MAX_JSON_BYTES,
) -> Json:
    """Return the JSON object of the response; raises as :func:`open_response`, ValueError if the body is not JSON, and InvalidResponse."""
    text = await request_bytes(api, method, path, query=query, body=body, headers=headers, max_bytes=max_bytes)
    try:
        found = json.loads(text)
    except RecursionError:
        raise InvalidResponse("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise InvalidResponse("it is not a JSON object")
    return found


async def request_object(
    api: Api,
    method: str,
    path: str,
    kind: type[_M],
    *,
    query: Mapping[str, str] | None = None,
    body: Json | bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> _M:
    """Return the object of the response, read from protobuf; ``body`` is JSON, or the bytes of an object in protobuf.

    Raises as :func:`open_response`, and InvalidResponse.
    """
    sent = {"Accept": PROTOBUF, **({"Content-Type": PROTOBUF} if isinstance(body, bytes) else {}), **(headers or {})}
    data = await request_bytes(api, method, path, query=query, body=body, headers=sent, max_bytes=MAX_OBJECT_BYTES)
    try:
        return decode(kind, open_envelope(data).raw)
    except InvalidObject as error:
        raise InvalidResponse(str(error)) from None


async def request_bytes(
    api: Api,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | bytes | None = None,
    headers: Mapping[str, str] | None = None,
    max_bytes: int = MAX_JSON_BYTES,
) -> bytes:
    """Return the body of the response; raises as :func:`open_response`, and InvalidResponse if it is too large."""
    limits = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with open_response(api, method, path, query=query, body=body, headers=headers, limits=limits) as response:
        data = await _read_start(response, max_bytes + 1)
    if len(data) > max_bytes:
        raise InvalidResponse(f"it has more than {max_bytes} bytes")
    return data


async def _read_start(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < max_bytes and (chunk := await response.content.read(max_bytes - len(data))):
        data += chunk
    return bytes(data)
