"""The reflector keeps its cache current in spite of failures of the API server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable
from collections.abc import Set as AbstractSet
from typing import Any

import pytest
from kubernetes.aio import client

from csi_driver.kube.metadata import read_metadata
from csi_driver.kube.reflector import Reflector, WatchedResource, WatchTimings
from tests.support.waiting import until
from tests.unit.kube.api_server import FakeApiServer
from tests.unit.kube.collection import Collection

SERVICES = WatchedResource("services", "/api/v1/services")
PODS = WatchedResource("pods", "/api/v1/pods", metadata_only=True, field_selector="status.phase!=Failed")
QUICK = WatchTimings(first_retry=0.01, longest_retry=0.05)


class LabelCache:
    """Labels by name."""

    def __init__(self) -> None:
        self.labels: dict[Hashable, dict[str, str]] = {}
        self.lists = 0

    def put(self, item: dict[str, Any]) -> Hashable:
        found = read_metadata(item)
        self.labels[found.name] = dict(found.labels)
        return found.name

    def remove(self, item: dict[str, Any]) -> None:
        self.labels.pop(read_metadata(item).name, None)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        self.lists += 1
        self.labels = {name: labels for name, labels in self.labels.items() if name in keys}


def item(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "web", "labels": labels}}


@pytest.fixture
def services(server: FakeApiServer) -> Collection:
    return server.collection("services")


@contextlib.asynccontextmanager
async def following(
    api: client.ApiClient, resource: WatchedResource = SERVICES, timings: WatchTimings = QUICK
) -> AsyncIterator[tuple[Reflector, LabelCache]]:
    cache = LabelCache()
    reflector = Reflector(api, resource, cache, timings=timings)
    task = asyncio.create_task(reflector.run())
    try:
        yield reflector, cache
        assert not task.done(), "the reflector ended"
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_reflector_lists_then_applies_changes(services: Collection, api: client.ApiClient) -> None:
    services.put(item("first", app="a"))
    async with following(api) as (reflector, cache):
        assert not reflector.synced
        await until(lambda: reflector.synced, "the list")
        assert cache.labels == {"first": {"app": "a"}}
        services.put(item("second"))
        services.put(item("first", app="b"))
        await until(lambda: cache.labels == {"first": {"app": "b"}, "second": {}}, "both changes")
        services.remove("web/first")
        await until(lambda: cache.labels == {"second": {}}, "the deletion")
        assert (cache.lists, reflector.failing_since) == (1, None)


async def test_reflector_lists_in_pages(services: Collection, api: client.ApiClient) -> None:
    for number in range(1201):
        services.put(item(f"service-{number}"))
    async with following(api) as (reflector, cache):
        await until(lambda: reflector.synced, "the list")
        assert len(cache.labels) == 1201
    lists = [query for query in services.queries if "watch" not in query]
    assert [query["limit"] for query in lists] == ["500"] * 3
    assert ["continue" in query for query in lists] == [False, True, True]


async def test_reflector_requests_metadata_only(server: FakeApiServer, api: client.ApiClient) -> None:
    """Without finished pods, and with bookmarks, which keep the version recent."""
    pods = server.collection("pods")
    async with following(api, PODS) as (reflector, _):
        await until(lambda: reflector.synced and pods.watching, "the watch")
    assert pods.accepts == [
        "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
        "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
    ]
    assert {query["fieldSelector"] for query in pods.queries} == {"status.phase!=Failed"}
    assert pods.queries[1]["allowWatchBookmarks"] == "true"
    assert 200 <= int(pods.queries[1]["timeoutSeconds"]) <= 340


async def test_watch_resumes_after_it_ends(server: FakeApiServer, services: Collection, api: client.ApiClient) -> None:
    """From the last event or bookmark, without another list."""
    async with following(api, timings=WatchTimings(watch=1.0, first_retry=0.01)) as (reflector, cache):
        await until(lambda: services.watching, "the watch")
        services.bookmark()
        version = str(services.version)
        await until(lambda: any(query.get("resourceVersion") == version for query in services.queries), "another watch")
        services.put(item("late"))
        await until(lambda: "late" in cache.labels, "an event of the later watch")
        assert (cache.lists, reflector.failing_since) == (1, None)
    assert server.fail is None


async def test_reflector_lists_again_if_history_expired(services: Collection, api: client.ApiClient) -> None:
    services.put(item("old"))
    async with following(api, timings=WatchTimings(watch=1.0, first_retry=0.01)) as (_, cache):
        await until(lambda: services.watching, "the watch")
        await until(lambda: not services.watching, "the end of the watch")
        services.remove("web/old")
        services.put(item("new"))
        services.compact()
        await until(lambda: cache.labels == {"new": {}}, "another list")
        assert cache.lists >= 2


async def test_reflector_restarts_a_list_that_expired_between_pages(
    services: Collection, api: client.ApiClient
) -> None:
    for number in range(600):
        services.put(item(f"service-{number}"))
    answer = services.answer

    async def then_expired(request: Any) -> Any:
        response = await answer(request)
        if len(services.queries) == 1:
            services.compact()
        return response

    services.answer = then_expired  # type: ignore[method-assign]  # between two pages
    async with following(api) as (reflector, cache):
        await until(lambda: reflector.synced, "a complete list")
        assert len(cache.labels) == 600


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"7",
        b"\xff",
        b'{"type": "ADDED"}',
        b'{"type": "ADDED", "object": 7}',
        b'{"type": "ADDED", "object": {}}',
        b'{"type": "ADDED", "object": {"metadata": {"name": 7, "uid": "x"}}}',
        b'{"type": "ADDED", "object": {"metadata": {"name": "x", "uid": "x", "labels": {"a": 7}}}}',
        b'{"type": "ERROR", "object": {"code": 500}}',
        b'{"type": "ERROR", "object": null}',
        b'{"type": "ADDED", "object": "' + b"x" * 20_000_000 + b'"}',
    ],
    ids=lambda line: line[:40].decode(errors="replace"),
)
async def test_reflector_lists_again_after_an_invalid_event(
    line: bytes, services: Collection, api: client.ApiClient
) -> None:
    async with following(api) as (reflector, cache):
        await until(lambda: services.watching, "the watch")
        services.send(line)
        await until(lambda: cache.lists > 1 and services.watching, "another list")
        services.put(item("after"))
        await until(lambda: "after" in cache.labels and reflector.failing_since is None, "the next event")


@pytest.mark.parametrize(
    "answer",
    [
        b"[]",
        b"{}",
        b'{"kind": "Status", "metadata": {}}',
        b'{"kind": "ServiceList", "items": []}',
        b'{"kind": "ServiceList", "items": {}, "metadata": {}}',
        b'{"kind": "ServiceList", "items": [7], "metadata": {}}',
    ],
)
async def test_invalid_list_is_a_temporary_failure(answer: bytes, server: FakeApiServer, api: client.ApiClient) -> None:
    """If it counted as an empty list, no pod would get the names of its Services."""
    server.fail = (200, answer)
    async with following(api) as (reflector, _):
        await until(lambda: reflector.failing_since is not None, "the failure")
        assert not reflector.synced
        server.fail = None
        await until(lambda: reflector.synced and reflector.failing_since is None, "the recovery")


async def test_cache_keeps_objects_during_an_outage(server: FakeApiServer, api: client.ApiClient) -> None:
    services = server.collection("services")
    services.put(item("cache"))
    async with following(api) as (reflector, cache):
        await until(lambda: services.watching, "the watch")
        server.fail = (503, b"{}")
        services.send(b"{")
        await until(lambda: reflector.failing_since is not None, "the failure")
        services.remove("web/cache")
        assert cache.labels == {"cache": {}}
        assert reflector.synced
        server.fail = None
        await until(lambda: cache.labels == {}, "the deletion during the outage")
        assert reflector.failing_since is None


async def test_reflector_waits_for_retry_after(server: FakeApiServer, api: client.ApiClient) -> None:
    server.fail, server.fail_headers = (429, b"{}"), {"Retry-After": "7"}
    pauses: list[float] = []
    asleep = asyncio.Event()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        asleep.set()
        await asyncio.Event().wait()

    cache = LabelCache()
    reflector = Reflector(api, SERVICES, cache, timings=QUICK, sleep=pause)
    task = asyncio.create_task(reflector.run())
    await asleep.wait()
    task.cancel()
    await asyncio.wait([task])
    assert pauses == [7.0]


async def test_reflector_backs_off_if_watches_end_at_once(services: Collection, api: client.ApiClient) -> None:
    """For example because of a proxy that ends long requests."""
    services.breaking = True
    pauses: list[float] = []
    enough = asyncio.Event()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 8:
            enough.set()
            await asyncio.Event().wait()

    reflector = Reflector(
        api, SERVICES, LabelCache(), timings=WatchTimings(first_retry=0.1, longest_retry=5.0), sleep=pause
    )
    task = asyncio.create_task(reflector.run())
    await enough.wait()
    task.cancel()
    await asyncio.wait([task])
    assert pauses[-1] >= 2.5
    assert pauses[0] <= 0.2


async def test_reflector_replaces_a_watch_without_data(services: Collection, api: client.ApiClient) -> None:
    """A dead connection delivers no bookmarks."""
    async with following(api, timings=WatchTimings(silence=0.05, first_retry=0.01)) as (reflector, cache):
        await until(lambda: sum("watch" in query for query in services.queries) >= 3, "further watches")
        assert cache.lists == 1
        assert (reflector.failing_since, reflector._failures) == (None, 0)
