"""TokenReviews: the request, the result and failures."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kubernetes.aio import client

from csi_driver.core.cluster.objects import ReviewedToken
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.kube.client import connect
from csi_driver.kube.tokens import TokenReviewClient
from tests.unit.kube.api_server import FakeApiServer

TOKEN = Secret("header.claims.signature-of-the-token")
PREFIX = "authentication.kubernetes.io/"
LIVE: dict[str, Any] = {
    "authenticated": True,
    "audiences": ["certmount"],
    "user": {
        "username": "system:serviceaccount:default:hello",
        "uid": "sa-uid",
        "groups": ["system:serviceaccounts"],
        "extra": {
            PREFIX + "credential-id": ["JTI=1"],
            PREFIX + "node-name": ["node-a"],
            PREFIX + "node-uid": ["node-uid"],
            PREFIX + "pod-name": ["hello-0"],
            PREFIX + "pod-uid": ["pod-uid"],
        },
    },
}


async def test_review_returns_the_owner_of_a_valid_token(server: FakeApiServer, api: client.ApiClient) -> None:
    server.review = LIVE
    reviewed = await TokenReviewClient(api).review(TOKEN, "certmount")
    assert reviewed == ReviewedToken(
        "system:serviceaccount:default:hello", "sa-uid", "hello-0", "pod-uid", "node-a", "node-uid"
    )
    method, path, body = server.requests[0]
    assert (method, path) == ("POST", "/apis/authentication.k8s.io/v1/tokenreviews")
    assert body is not None
    assert body["spec"] == {"token": TOKEN.reveal(), "audiences": ["certmount"]}


@pytest.mark.parametrize(
    "status,words",
    [
        ({"authenticated": False}, "rejects the token; the pod may be deleted"),
        ({}, "rejects the token"),
        ({"error": "service account token has been invalidated"}, "(service account token has been invalidated)"),
        ({**LIVE, "authenticated": False}, "rejects the token"),
        ({**LIVE, "audiences": ["https://kubernetes.default.svc"]}, "rejects the token for audience certmount"),
        ({**LIVE, "audiences": []}, "rejects the token for audience certmount"),
        ({"authenticated": True, "audiences": ["certmount"]}, "rejects the token"),
    ],
)
async def test_review_rejects_all_but_an_explicit_success_for_the_audience(
    status: dict[str, Any], words: str, server: FakeApiServer, api: client.ApiClient
) -> None:
    """An API server can ignore audiences or send an incomplete status."""
    server.review = status
    with pytest.raises(CertmountError) as rejection:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert rejection.value.reason is Reason.TOKEN_REJECTED
    assert words in str(rejection.value)


async def test_error_that_quotes_the_token_is_dropped(server: FakeApiServer, api: client.ApiClient) -> None:
    """Some authenticators quote the token in their error."""
    server.review = {"authenticated": False, "error": f"no such token {TOKEN.reveal()}"}
    with pytest.raises(CertmountError) as rejection:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert "signature-of-the-token" not in str(rejection.value)


@pytest.mark.parametrize("extra", [None, {}, {PREFIX + "node-name": []}, {PREFIX + "node-name": ["a", "b"]}])
async def test_missing_extra_is_empty(extra: Any, server: FakeApiServer, api: client.ApiClient) -> None:
    """As in clusters before 1.30."""
    server.review = {**LIVE, "user": {**LIVE["user"], "extra": extra}}
    assert (await TokenReviewClient(api).review(TOKEN, "certmount")).node_name == ""


@pytest.mark.parametrize(
    "fail,words",
    [
        ((500, b"{}"), "HTTP 500"),
        ((429, b"{}"), "HTTP 429"),
        ((401, b"{}"), "HTTP 401"),
        ((409, b"{}"), "changed it at the same time"),
        (
            (403, b'{"kind": "Status", "message": "tokenreviews is forbidden: cannot create"}'),
            "HTTP 403: tokenreviews is forbidden: cannot create",
        ),
        ((403, b"<html>"), "HTTP 403"),
        ((201, b"<html>"), "sent an invalid response"),
        ((201, b'{"status": {"authenticated": "perhaps"}}'), "sent an invalid response"),
        ((201, b'{"status": {"authenticated": true, "user": 7}}'), "sent an invalid response"),
        ((201, b'{"status": 7}'), "sent an invalid response"),
        ((201, b"7"), "sent an invalid response"),
        ((201, b"[]"), "sent an invalid response"),
        ((201, b"null"), "sent an invalid response"),
        ((201, b""), "sent an invalid response"),
        ((201, b"\xff"), "sent an invalid response"),
    ],
)
async def test_failed_review_is_neither_success_nor_rejection(
    fail: tuple[int, bytes], words: str, server: FakeApiServer, api: client.ApiClient
) -> None:
    server.fail = fail
    with pytest.raises(CertmountError) as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE
    assert words in str(failure.value)
    assert TOKEN.reveal() not in str(failure.value)
    assert failure.value.__cause__ is None


async def test_review_times_out(server: FakeApiServer, api: client.ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.kube.tokens.TIMEOUT_S", 0.05)
    server.gate.clear()
    with pytest.raises(CertmountError, match="does not respond in time") as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE
    server.gate.set()


async def test_unreachable_api_server_is_reported() -> None:
    async with connect(client.Configuration(host="http://127.0.0.1:1")) as api:
        with pytest.raises(CertmountError, match="cannot reach the API server") as failure:
            await TokenReviewClient(api).review(TOKEN, "certmount")
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE


async def test_reviews_run_concurrently(server: FakeApiServer, api: client.ApiClient) -> None:
    server.review = LIVE
    server.gate.clear()
    reviewer = TokenReviewClient(api)
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for _ in range(80):
            tasks.create_task(reviewer.review(TOKEN, "certmount"))
        while len(server.requests) < 80:  # noqa: ASYNC110  # the server has no event for a number
            await asyncio.sleep(0.01)
        server.gate.set()
