"""What went wrong with the API server is told apart in words, and an outage of it ends by itself."""

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
        (401, "", "does not believe the authority's own token: it answers 401", None),
        (403, "9", "the API server answers 403", None),
        (429, "7", "is overloaded and turns requests away: it answers 429", 7.0),
        (429, "", "is overloaded and turns requests away: it answers 429", None),
        (429, "Wed, 21 Oct 2026 07:28:00 GMT", "answers 429", None),
        (429, "-1", "answers 429", None),
        (429, "\u0667", "answers 429", None),
        (503, "3600", "has trouble of its own: it answers 503", 60.0),
        (500, "", "has trouble of its own: it answers 500", None),
    ],
)
async def test_whose_trouble_it_is(
    status: int, retry_after: str, words: str, seconds: float | None, server: FakeApiServer, api: client.ApiClient
) -> None:
    """In words, with the status, and with the pause that the API server asks for, within reason."""
    server.fail, server.fail_headers = (status, b"{}"), {"Retry-After": retry_after}
    with pytest.raises(ApiError, match=words) as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert (failure.value.status, failure.value.retry_after_s) == (status, seconds)
    assert failure.value.retryable


async def test_a_conflict_is_an_answer_too(server: FakeApiServer, api: client.ApiClient) -> None:
    """With its status, like the others."""
    server.fail = (409, b"{}")
    with pytest.raises(Conflict) as failure:
        await TokenReviewClient(api).review(TOKEN, "certmount")
    assert failure.value.status == 409


@pytest.mark.parametrize(
    "error,words",
    [
        (TimeoutError(), "does not answer in time"),
        (ConnectionRefusedError(), r"cannot be reached \(ConnectionRefusedError\)"),
        (ValueError("secret"), r"answer is strange \(ValueError\)"),
    ],
)
async def test_no_answer_at_all(error: Exception, words: str) -> None:
    """Slow, gone, or not an API server; what the exception says is not passed on, as it may quote the request."""

    async def fail() -> None:
        raise error

    with pytest.raises(CertmountError, match=words) as failure:
        await call_api(fail(), Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview")
    assert not isinstance(failure.value, ApiError)
    assert "secret" not in str(failure.value)


async def test_an_api_server_that_was_stopped_is_found_again() -> None:
    """By the same clients, on connections that it has closed meanwhile: nobody needs to restart the authority."""
    server = FakeApiServer()
    server.review = LIVE
    async with server.running():
        port = server.port
        api = connect(client.Configuration(host=server.url))
        await TokenReviewClient(api).review(TOKEN, "certmount")
    async with api:
        for _ in range(3):
            with pytest.raises(CertmountError, match="cannot be reached"):
                await TokenReviewClient(api).review(TOKEN, "certmount")
        async with server.running(port=port):
            assert (await TokenReviewClient(api).review(TOKEN, "certmount")).pod_name == "hello-0"
            await TokenKeyClient(api).fetch()


async def test_the_view_of_a_cluster_survives_its_api_server() -> None:
    """What is known stays, counts for a minute, and is up to date again soon after the return."""
    server, clock = FakeApiServer(), Clock(1000.0)
    services = server.collection("services")
    services.put({"metadata": {"name": "gone", "namespace": "web"}, "spec": {"selector": {"app": "a"}}})
    async with server.running():
        port = server.port
        api = connect(client.Configuration(host=server.url))
        view = ClusterCache(api, timings=WatchTimings(first_retry=0.01, longest_retry=0.02), clock=clock)
        assert "the cluster's pods are not known yet" in view.outdated()
        task = asyncio.create_task(view.run())
        await until(lambda: view.synced and services.watching, "all lists")
        assert (list(view.outdated()), set(view.failing_s().values())) == ([], {0.0})
    async with api:
        await until(lambda: view._reflectors[2].failing_since is not None, "the failure")
        clock.forward(STALE_S - 1)
        assert view.services.select("web", (("app", "a"),)) == ("gone",)
        assert list(view.outdated()) == []
        clock.forward(2)
        assert any("services could not be followed for more than 60 s" in reason for reason in view.outdated())
        assert view.failing_s()["services"] == STALE_S + 1
        services.remove("web/gone")
        async with server.running(port=port):
            await until(lambda: not view.outdated(), "the return")
            await until(lambda: not view.services.select("web", (("app", "a"),)), "what happened meanwhile")
        task.cancel()
        await asyncio.wait([task])


def test_caches_do_not_load_the_kubernetes_package() -> None:
    """Outside a cluster its 25 MB are of no use; the modules that the authority's own code imports don't import it."""
    folder = Path(__file__).parents[3] / "csi_driver" / "kube"
    for name in ("awaited", "metadata", "namespaces", "pods", "services"):
        assert "kubernetes" not in (folder / f"{name}.py").read_text(), name
