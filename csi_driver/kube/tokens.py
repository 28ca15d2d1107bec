"""Service account tokens at the API server: TokenReviews and the public keys of the token issuer."""

from __future__ import annotations

import json
from typing import TypeVar

from csi_driver.core.cluster.objects import PublishedKeys, ReviewedToken
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import TOKEN_FIELD
from csi_driver.core.secret import Secret
from csi_driver.kube.client import call_api, invalid_response
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import request_bytes, request_json
from csi_driver.kube.metadata import Json

_T = TypeVar("_T")
_MAX_ERROR_TEXT = 200
_REVIEWS, _REVIEW = "/apis/authentication.k8s.io/v1/tokenreviews", "TokenReview"
_DISCOVERY = "service account issuer discovery"


class TokenReviewClient:
    """Creates TokenReviews (authentication.k8s.io/v1)."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def review(self, token: Secret[str], audience: str) -> ReviewedToken:
        """Return the owner of a valid token.

        Raises CertmountError TokenRejected if the token is invalid, TokenReviewUnavailable if the review fails.
        """
        spec = {"token": token.reveal(), "audiences": [audience]}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        call = request_json(self._api, "POST", _REVIEWS, body=body)
        review = await call_api(call, Reason.TOKEN_REVIEW_UNAVAILABLE, _REVIEW)
        try:
            return _reviewed(_get(review, "status", dict), token, audience)
        except TypeError as error:
            raise invalid_response(Reason.TOKEN_REVIEW_UNAVAILABLE, _REVIEW, type(error).__name__) from None


class TokenKeyClient:
    """Reads the token issuer's name and keys (KEP-1393: service account issuer discovery)."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def fetch(self) -> PublishedKeys:
        """Return the current name and keys; raises CertmountError TokenReviewUnavailable."""
        configuration = await self._read("/.well-known/openid-configuration")
        jwks = await self._read("/openid/v1/jwks")
        try:
            issuer = json.loads(configuration)["issuer"]
        except (ValueError, TypeError, KeyError, RecursionError):
            issuer = None
        if not isinstance(issuer, str) or not issuer:
            fault = Fault(_DISCOVERY, "the API server's discovery document has no issuer")
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, fault)
        return PublishedKeys(issuer, jwks)

    async def _read(self, path: str) -> bytes:
        return await call_api(request_bytes(self._api, "GET", path), Reason.TOKEN_REVIEW_UNAVAILABLE, _DISCOVERY)


def _reviewed(status: Json, token: Secret[str], audience: str) -> ReviewedToken:
    user = _get(status, "user", dict)
    if not _get(status, "authenticated", bool) or not user:
        detail = _error_text(_get(status, "error", str), token)
        raise CertmountError(Reason.TOKEN_REJECTED, f"the API server rejects the token{detail}; the pod may be deleted")
    if audience not in _get(status, "audiences", list):
        raise CertmountError(Reason.TOKEN_REJECTED, f"the API server rejects the token for audience {audience}")
    extra = _get(user, "extra", dict)
    return ReviewedToken(
        username=_get(user, "username", str),
        uid=_get(user, "uid", str),
        pod_name=_single(extra, "pod-name"),
        pod_uid=_single(extra, "pod-uid"),
        node_name=_single(extra, "node-name"),
        node_uid=_single(extra, "node-uid"),
    )


def _get(item: Json, name: str, kind: type[_T]) -> _T:
    """Return a value, or an empty one if it is missing or null; raises TypeError for a value of another type."""
    value = item.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise TypeError(name)
    return value


def _single(extra: Json, name: str) -> str:
    values = _get(extra, TOKEN_FIELD + name, list)
    return str(values[0]) if len(values) == 1 else ""


def _error_text(error: str, token: Secret[str]) -> str:
    """Return the API server's error unless it quotes the token, which the token's signature shows."""
    if not error or token.reveal().rpartition(".")[2] in error:
        return ""
    return f" ({error[:_MAX_ERROR_TEXT]})"
