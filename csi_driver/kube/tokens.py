"""Service account tokens at the API server: TokenReviews and the public keys of the token issuer."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping, Sequence

import aiohttp
from kubernetes.aio import client

from csi_driver.core.cluster.objects import PublishedKeys, ReviewedToken
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.kube.client import TIMEOUT_S, call_api

_EXTRA = "authentication.kubernetes.io/"
_MAX_ERROR_TEXT = 200
_DISCOVERY = "service account issuer discovery"


class TokenReviewClient:
    """Creates TokenReviews (authentication.k8s.io/v1)."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = client.AuthenticationV1Api(api)

    async def review(self, token: Secret[str], audience: str) -> ReviewedToken:
        """Return the owner of a valid token.

        Raises CertmountError TokenRejected if the token is invalid, TokenReviewUnavailable if the review fails.
        """
        spec = client.V1TokenReviewSpec(token=token.reveal(), audiences=[audience])
        call = self._api.create_token_review(client.V1TokenReview(spec=spec), _request_timeout=TIMEOUT_S)
        review = await call_api(call, Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview")
        status = review.status
        if status is None or not status.authenticated or status.user is None:
            detail = _error_text(status.error if status is not None else None, token)
            raise CertmountError(
                Reason.TOKEN_REJECTED, f"the API server rejects the token{detail}; the pod may be deleted"
            )
        if audience not in (status.audiences or ()):
            raise CertmountError(Reason.TOKEN_REJECTED, f"the API server rejects the token for audience {audience}")
        extra = status.user.extra or {}
        return ReviewedToken(
            username=status.user.username or "",
            uid=status.user.uid or "",
            pod_name=_single(extra, "pod-name"),
            pod_uid=_single(extra, "pod-uid"),
            node_name=_single(extra, "node-name"),
            node_uid=_single(extra, "node-uid"),
        )


class TokenKeyClient:
    """Reads the token issuer's name and keys (KEP-1393: service account issuer discovery)."""

    def __init__(self, api: client.ApiClient) -> None:
        self._discovery = client.WellKnownApi(api)
        self._keys = client.OpenidApi(api)

    async def fetch(self) -> PublishedKeys:
        """Return the current name and keys; raises CertmountError TokenReviewUnavailable."""
        # The generated typed calls would convert the JSON to the text of a Python dict.
        read_issuer = self._discovery.get_service_account_issuer_open_id_configuration_without_preload_content
        read_keys = self._keys.get_service_account_issuer_open_id_keyset_without_preload_content
        configuration = await _body(read_issuer(_request_timeout=TIMEOUT_S))
        jwks = await _body(read_keys(_request_timeout=TIMEOUT_S))
        try:
            issuer = json.loads(configuration)["issuer"]
        except (ValueError, TypeError, KeyError, RecursionError):
            issuer = None
        if not isinstance(issuer, str) or not issuer:
            fault = Fault(_DISCOVERY, "the API server's discovery document has no issuer")
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, fault)
        return PublishedKeys(issuer, jwks)


async def _body(call: Awaitable[aiohttp.ClientResponse]) -> bytes:
    async def read() -> bytes:
        response = await call
        body = await response.read()
        if response.status != 200:
            raise client.ApiException(status=response.status)
        return body

    return await call_api(read(), Reason.TOKEN_REVIEW_UNAVAILABLE, _DISCOVERY)


def _single(extra: Mapping[str, Sequence[str]], name: str) -> str:
    values = extra.get(_EXTRA + name) or []
    return values[0] if len(values) == 1 else ""


def _error_text(error: str | None, token: Secret[str]) -> str:
    """Return the API server's error unless it quotes the token, which the token's signature shows."""
    if not error or token.reveal().rpartition(".")[2] in error:
        return ""
    return f" ({error[:_MAX_ERROR_TEXT]})"
