"""The API server's own description as a token issuer (KEP-1393: service account issuer discovery)."""

from __future__ import annotations

import json
from collections.abc import Awaitable

import aiohttp
from kubernetes.aio import client

from csi_driver.core.cluster.token_review import PublishedKeys
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import TIMEOUT_S, answered

_WHAT = "service account issuer discovery"


class ClusterTokenKeys:
    """Reads the issuer's name and its keys from the API server, wherever the discovery document says they are published."""

    def __init__(self, api: client.ApiClient) -> None:
        self._discovery = client.WellKnownApi(api)
        self._keys = client.OpenidApi(api)

    async def fetch(self) -> PublishedKeys:
        """Both as they are now; raises CertmountError TokenReviewUnavailable."""
        # The typed calls would turn the JSON into Python's notation of a dict.
        configuration = await _body(
            self._discovery.get_service_account_issuer_open_id_configuration_without_preload_content(
                _request_timeout=TIMEOUT_S
            )
        )
        jwks = await _body(
            self._keys.get_service_account_issuer_open_id_keyset_without_preload_content(_request_timeout=TIMEOUT_S)
        )
        try:
            issuer = json.loads(configuration)["issuer"]
        except (ValueError, TypeError, KeyError, RecursionError):
            issuer = None
        if not isinstance(issuer, str) or not issuer:
            problem = "the API server names no issuer"
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault(_WHAT, problem))
        return PublishedKeys(issuer, jwks)


async def _body(call: Awaitable[aiohttp.ClientResponse]) -> bytes:
    async def read() -> bytes:
        response = await call
        body = await response.read()
        if response.status != 200:
            raise client.ApiException(status=response.status)
        return body

    return await answered(read(), Reason.TOKEN_REVIEW_UNAVAILABLE, _WHAT)
