"""Failures of the API server and recovery from an outage."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from kubernetes.aio import client

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.client import ApiError, Conflict, call_api, connect
from csi_driver.kube.cluster_cache import STALE_S, ClusterCache
from csi_driver.kube.reflector import WatchTimings
from csi_driver.kube.tokens import TokenKeyClient, TokenReviewClient
from tests.support.waiting import until
from tests.unit.authority.clock import Clock
from tests.unit.kube.api_server import FakeApiServer
from tests.unit.kube.test_tokens import LIVE, TOKEN


@pytest.mark.parametrize(
    "status,retry_after,words,seconds",
    [
        (401, "", "rejects the authority's own token: HTTP 401", None),
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
    status: int, retry_after: str, words: str, seconds: float | None, server: FakeApiServer, api: client.ApiClient
) -> None:
    server.fail, server.fail_headers = (status, b"{}"), {"Retry-After": retry_after}
    with pytest.raises(ApiError, match=words) as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert (failure.value.status, failure.value.retry_after_s) == (status, seconds)
    assert failure.value.retryable


async def test_conflict_has_the_http_status(server: FakeApiServer, api: client.ApiClient) -> None:
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
    async with server.running():
        port = server.port
        api = connect(client.Configuration(host=server.url))
        await TokenReviewClient(api).review(TOKEN, "certmount")
    async with api:
        for _ in range(3):
            with pytest.raises(CertmountError, match="cannot reach the API server"):
                await TokenReviewClient(api).review(TOKEN, "certmount")
        async with server.running(port=port):
            assert (await TokenReviewClient(api).review(TOKEN, "certmount")).pod_name == "hello-0"
            await TokenKeyClient(api).fetch()


async def test_caches_survive_an_outage_for_a_minute_and_recover() -> None:
    server, clock = FakeApiServer(), Clock(1000.0)
    services = server.collection("services")
    services.put({"metadata": {"name": "gone", "namespace": "web"}, "spec": {"selector": {"app": "a"}}})
    async with server.running():
        port = server.port
        api = connect(client.Configuration(host=server.url))
        cache = ClusterCache(api, timings=WatchTimings(first_retry=0.01, longest_retry=0.02), clock=clock)
        assert "the list of the cluster's pods is not complete yet" in cache.outdated()
        task = asyncio.create_task(cache.run())
        await until(lambda: cache.synced and services.watching, "all lists")
        assert (list(cache.outdated()), set(cache.failing_s().values())) == ([], {0.0})
    async with api:
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


def test_caches_do_not_load_the_kubernetes_package() -> None:
    """Outside a cluster the package would take 25 MB for nothing."""
    directory = Path(__file__).parents[3] / "csi_driver" / "kube"
    for name in ("key_waiters", "metadata", "object_caches", "csr_cache"):
        assert "kubernetes" not in (directory / f"{name}.py").read_text(), name
