"""TokenReviews, errors of the API server, and recovery from an outage."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from csi_driver.core.cluster.objects import ReviewedToken
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.kube.client import ApiError, Conflict, call_api
from csi_driver.kube.cluster_cache import STALE_S, ClusterCache
from csi_driver.kube.connection import Api, ApiConfiguration
from csi_driver.kube.reflector import WatchedResource, WatchTimings
from csi_driver.kube.tokens import TokenKeyClient, TokenReviewClient
from tests.support.waiting import until
from tests.unit.authority.clock import Clock
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


async def test_review_returns_the_owner_of_a_valid_token(server: FakeApiServer, api: Api) -> None:
    server.review = LIVE
    reviewed = await TokenReviewClient(api).review(TOKEN, "certmount")
    assert reviewed == ReviewedToken(LIVE["user"]["username"], "sa-uid", "hello-0", "pod-uid", "node-a", "node-uid")
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
    status: dict[str, Any], words: str, server: FakeApiServer, api: Api
) -> None:
    """An API server can ignore audiences or send an incomplete status."""
    server.review = status
    with pytest.raises(CertmountError, match=r"^TokenRejected: ") as rejection:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert words in str(rejection.value)


async def test_error_that_quotes_the_token_is_dropped(server: FakeApiServer, api: Api) -> None:
    server.review = {"authenticated": False, "error": f"no such token {TOKEN.reveal()}"}
    with pytest.raises(CertmountError) as rejection:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert "signature-of-the-token" not in str(rejection.value)


@pytest.mark.parametrize("extra", [None, {}, {PREFIX + "node-name": []}, {PREFIX + "node-name": ["a", "b"]}])
async def test_missing_extra_is_empty(extra: Any, server: FakeApiServer, api: Api) -> None:
    """As in clusters before 1.30."""
    server.review = {**LIVE, "user": {**LIVE["user"], "extra": extra}}
    assert (await TokenReviewClient(api).review(TOKEN, "certmount")).node_name == ""


@pytest.mark.parametrize(
    "fail,words",
    [
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
    fail: tuple[int, bytes], words: str, server: FakeApiServer, api: Api
) -> None:
    server.fail = fail
    with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: ") as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert words in str(failure.value)
    assert TOKEN.reveal() not in str(failure.value)
    assert failure.value.__cause__ is None


async def test_review_times_out(server: FakeApiServer, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.kube.json_requests.TIMEOUT_S", 0.05)
    server.gate.clear()
    with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: .*does not respond in time"):
        await TokenReviewClient(api).review(TOKEN, "certmount")
    server.gate.set()


async def test_reviews_run_concurrently(server: FakeApiServer, api: Api) -> None:
    server.review = LIVE
    server.gate.clear()
    reviewer = TokenReviewClient(api)
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for _ in range(80):
            tasks.create_task(reviewer.review(TOKEN, "certmount"))
        while len(server.requests) < 80:  # noqa: ASYNC110  # the server has no event for a number
            await asyncio.sleep(0.01)
        server.gate.set()


@pytest.mark.parametrize(
    "status,retry_after,words,seconds",
    [
        (401, "", "rejects the credentials of this client: HTTP 401", None),
        (403, "9", "rejects the request: HTTP 403", None),
        (429, "7", "is overloaded: HTTP 429", 7.0),
        (429, "", "is overloaded: HTTP 429", None),
        (429, "Wed, 21 Oct 2026 07:28:00 GMT", "HTTP 429", None),
        (429, "-1", "HTTP 429", None),
        (429, "\u0667", "HTTP 429", None),
        (503, "3600", "has an internal error: HTTP 503", 60.0),
        (500, "", "has an internal error: HTTP 500", None),
    ],
)
async def test_error_response_is_described_with_status_and_retry_after(
    status: int, retry_after: str, words: str, seconds: float | None, server: FakeApiServer, api: Api
) -> None:
    server.fail, server.fail_headers = (status, b"{}"), {"Retry-After": retry_after}
    with pytest.raises(ApiError, match=rf"^TokenReviewUnavailable: .*{words}") as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert (failure.value.status, failure.value.retry_after_s) == (status, seconds)
    assert failure.value.retryable


async def test_conflict_has_the_http_status(server: FakeApiServer, api: Api) -> None:
    server.fail = (409, b"{}")
    with pytest.raises(Conflict) as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert failure.value.status == 409


@pytest.mark.parametrize(
    "error,words",
    [
        (TimeoutError(), "does not respond in time"),
        (ConnectionRefusedError(), r"cannot reach the API server \(ConnectionRefusedError\)"),
        (ValueError("secret"), r"sent an invalid response \(ValueError\)"),
    ],
)
async def test_failure_without_response_does_not_quote_the_request(error: Exception, words: str) -> None:
    async def fail() -> None:
        raise error

    with pytest.raises(CertmountError, match=words) as failure:
        await call_api(fail(), Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview")
    assert not isinstance(failure.value, ApiError)
    assert "secret" not in str(failure.value)


async def test_client_reconnects_after_api_server_restart() -> None:
    server = FakeApiServer()
    server.review = LIVE
    async with contextlib.AsyncExitStack() as stack:
        async with server.running():
            port = server.port
            api = await stack.enter_async_context(Api(ApiConfiguration(url=server.url)))
            await TokenReviewClient(api).review(TOKEN, "certmount")
        for _ in range(3):
            with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: .*cannot reach the API server"):
                await TokenReviewClient(api).review(TOKEN, "certmount")
        async with server.running(port=port):
            assert (await TokenReviewClient(api).review(TOKEN, "certmount")).pod_name == "hello-0"
            await TokenKeyClient(api).fetch()


async def test_caches_survive_an_outage_for_a_minute_and_recover() -> None:
    server, clock = FakeApiServer(), Clock(1000.0)
    services = server.collection("services")
    services.put({"metadata": {"name": "gone", "namespace": "web"}, "spec": {"selector": {"app": "a"}}})
    async with contextlib.AsyncExitStack() as stack:
        async with server.running():
            port = server.port
            api = await stack.enter_async_context(Api(ApiConfiguration(url=server.url)))
            cache = ClusterCache(api, timings=WatchTimings(first_retry=0.01, longest_retry=0.02), clock=clock)
            assert "the list of the cluster's pods is not complete yet" in cache.outdated()
            task = asyncio.create_task(cache.run())
            await until(lambda: cache.synced and services.watching, "all lists")
            assert (list(cache.outdated()), set(cache.failing_s().values())) == ([], {0.0})
        await until(lambda: cache._reflectors[2].failing_since is not None, "the failure")
        clock.forward(STALE_S - 1)
        assert cache.services.select("web", (("app", "a"),)) == ("gone",)
        assert list(cache.outdated()) == []
        clock.forward(2)
        assert any("services has failed for more than 60 s" in reason for reason in cache.outdated())
        assert cache.failing_s()["services"] == STALE_S + 1
        services.remove("web/gone")
        async with server.running(port=port):
            await until(lambda: not cache.outdated(), "the recovery")
            await until(lambda: not cache.services.select("web", (("app", "a"),)), "the changes during the outage")
        task.cancel()
        await asyncio.wait([task])


async def test_watch_that_recovers_during_a_scrape_fails_no_scrape(api: Api) -> None:
    """The thread of the scraper reads the time of the failure while the event loop clears it."""

    class Recovering:
        resource = WatchedResource("pods", "/api/v1/pods", bytes)
        reads = 0

        @property
        def failing_since(self) -> float | None:
            self.reads += 1
            return 40.0 if self.reads == 1 else None

    cache = ClusterCache(api, clock=Clock(100.0))
    cache._reflectors = (Recovering(),)  # type: ignore[assignment]  # has what a scrape reads
    assert cache.failing_s() == {"pods": 60.0}
