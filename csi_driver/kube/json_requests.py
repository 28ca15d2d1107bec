"""API requests in plain JSON: the generated models of ten thousand objects would take most of the process's memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping

import aiohttp
from kubernetes.aio import client

from csi_driver.kube.client import TIMEOUT_S
from csi_driver.kube.metadata import Json

MERGE_PATCH = "application/merge-patch+json"  # RFC 7396


@contextlib.asynccontextmanager
async def open_response(
    api: client.ApiClient,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | None = None,
    headers: Mapping[str, str] | None = None,
    limits: aiohttp.ClientTimeout,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Yield a response with an unread body; raises client.ApiException for status >= 400, and aiohttp's exceptions."""
    method, url, sent_headers, sent_body, _ = await api.param_serialize(
        method,
        path,
        query_params=list((query or {}).items()),
        header_params=dict(headers or {}),
        body=body,
        auth_settings=["BearerToken"],
    )
    # The kubernetes package passes the timeout to aiohttp unchanged.
    response = (await api.call_api(method, url, sent_headers, sent_body, _request_timeout=limits)).response
    try:
        if response.status >= 400:
            error = client.ApiException(status=response.status, body=(await response.read()).decode(errors="replace"))
            error.headers = response.headers
            raise error
        yield response
    finally:
        response.close()  # does nothing if the body was read completely


async def request_json(
    api: client.ApiClient,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Json:
    """Return the JSON object of the response; raises as :func:`open_response`, and ValueError for any other body."""
    limits = aiohttp.ClientTimeout(total=timeout_s)
    async with open_response(api, method, path, query=query, body=body, headers=headers, limits=limits) as response:
        found = json.loads(await response.read())
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found
