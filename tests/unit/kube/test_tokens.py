"""TokenReviews: what is asked, what the answer means, and what no answer means."""

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


async def test_a_live_tokens_owner_is_read(server: FakeApiServer, api: client.ApiClient) -> None:
    """The token and our audience are asked about; every field of the answer that admission compares comes back."""
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
        ({"authenticated": False}, "does not accept it; its pod may be gone"),
        ({}, "does not accept it"),
        ({"error": "service account token has been invalidated"}, "(service account token has been invalidated)"),
        ({**LIVE, "authenticated": False}, "does not accept it"),
        ({**LIVE, "audiences": ["https://kubernetes.default.svc"]}, "does not accept it for audience certmount"),
        ({**LIVE, "audiences": []}, "does not accept it for audience certmount"),
        ({"authenticated": True, "audiences": ["certmount"]}, "does not accept it"),
    ],
)
async def test_anything_but_a_clear_yes_for_our_audience_is_a_no(
    status: dict[str, Any], words: str, server: FakeApiServer, api: client.ApiClient
) -> None:
    """An API server that ignores audiences, or answers with half a status, has not said yes."""
    server.review = status
    with pytest.raises(CertmountError) as rejection:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert rejection.value.reason is Reason.TOKEN_REJECTED
    assert words in str(rejection.value)


async def test_a_token_that_the_answer_quotes_is_not_passed_on(server: FakeApiServer, api: client.ApiClient) -> None:
    """Some authenticators put what they were given into their error."""
    server.review = {"authenticated": False, "error": f"no such token {TOKEN.reveal()}"}
    with pytest.raises(CertmountError) as rejection:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert "signature-of-the-token" not in str(rejection.value)


@pytest.mark.parametrize("extra", [None, {}, {PREFIX + "node-name": []}, {PREFIX + "node-name": ["a", "b"]}])
async def test_what_the_cluster_does_not_say_is_empty(extra: Any, server: FakeApiServer, api: client.ApiClient) -> None:
    """As with clusters before 1.30; empty agrees with no claim."""
    server.review = {**LIVE, "user": {**LIVE["user"], "extra": extra}}
    assert (await TokenReviewClient(api).review(TOKEN, "certmount")).node_name == ""


@pytest.mark.parametrize(
    "fail,words",
    [
        ((500, b"{}"), "answers 500"),
        ((429, b"{}"), "answers 429"),
        ((401, b"{}"), "answers 401"),
        ((409, b"{}"), "changed it at the same moment"),
        (
            (403, b'{"kind": "Status", "message": "tokenreviews is forbidden: cannot create"}'),
            "answers 403: tokenreviews is forbidden: cannot create",
        ),
        ((403, b"<html>"), "answers 403"),
        ((201, b"<html>"), "is strange"),
        ((201, b'{"status": {"authenticated": "perhaps"}}'), "is strange"),
        ((201, b'{"status": {"authenticated": true, "user": 7}}'), "is strange"),
        ((201, b'{"status": 7}'), "is strange"),
        ((201, b"7"), "is strange"),
        ((201, b"[]"), "is strange"),
        ((201, b"null"), "is strange"),
        ((201, b""), "is strange"),
        ((201, b"\xff"), "is strange"),
    ],
)
async def test_an_api_server_that_fails_has_said_nothing(
    fail: tuple[int, bytes], words: str, server: FakeApiServer, api: client.ApiClient
) -> None:
    """Neither yes nor no: to be tried again, whatever went wrong; a missing permission is named."""
    server.fail = fail
    with pytest.raises(CertmountError) as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE
    assert words in str(failure.value)
    assert TOKEN.reveal() not in str(failure.value)
    assert failure.value.__cause__ is None


async def test_a_hanging_api_server_is_given_up(
    server: FakeApiServer, api: client.ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In time for the caller to hear of it."""
    monkeypatch.setattr("csi_driver.kube.tokens.TIMEOUT_S", 0.05)
    server.gate.clear()
    with pytest.raises(CertmountError, match="does not answer in time") as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE
    server.gate.set()


async def test_an_api_server_that_is_not_there_is_said_in_words() -> None:
    """As while it restarts."""
    async with connect(client.Configuration(host="http://127.0.0.1:1")) as api:
        with pytest.raises(CertmountError, match="cannot be reached") as failure:
            await TokenReviewClient(api).review(TOKEN, "certmount")
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE


async def test_reviews_run_side_by_side(server: FakeApiServer, api: client.ApiClient) -> None:
    """No limit of a few a second stands before a rollout of many pods."""
    server.review = LIVE
    server.gate.clear()
    reviewer = TokenReviewClient(api)
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for _ in range(80):
            tasks.create_task(reviewer.review(TOKEN, "certmount"))
        while len(server.requests) < 80:  # noqa: ASYNC110  # the server has no event for a number
            await asyncio.sleep(0.01)
        server.gate.set()
