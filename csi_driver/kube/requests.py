"""Requests in plain JSON: the package's models of ten thousand objects would cost more than all else in the process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping

import aiohttp
from kubernetes.aio import client

from csi_driver.kube.client import TIMEOUT_S
from csi_driver.kube.metadata import Json

MERGE_PATCH = "application/merge-patch+json"
"""RFC 7396."""


@contextlib.asynccontextmanager
async def opened(
    api: client.ApiClient,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | None = None,
    headers: Mapping[str, str] | None = None,
    limits: aiohttp.ClientTimeout,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer, its body not read yet; raises client.ApiException for a status of 400 and above, and what aiohttp raises."""
    serialized = await api.param_serialize(
        method,
        path,
        query_params=list((query or {}).items()),
        header_params=dict(headers or {}),
        body=body,
        auth_settings=["BearerToken"],
    )
    method, url, sent_headers, sent_body, _ = serialized
    # The package hands the timeout to aiohttp as it is.
    answer = (await api.call_api(method, url, sent_headers, sent_body, _request_timeout=limits)).response
    try:
        if answer.status >= 400:
            error = client.ApiException(status=answer.status, body=(await answer.read()).decode(errors="replace"))
            error.headers = answer.headers
            raise error
        yield answer
    finally:
        answer.close()  # a body that was read to its end has given its connection back already


async def ask(
    api: client.ApiClient,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Json | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Json:
    """The answer's JSON object; raises as :func:`opened`, and ValueError for a body that is none."""
    limits = aiohttp.ClientTimeout(total=timeout_s)
    async with opened(api, method, path, query=query, body=body, headers=headers, limits=limits) as answer:
        found = json.loads(await answer.read())
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found
