"""A reflector: the sink is as the cluster is, whatever the API server does in between."""

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


class Kept:
    """A sink that keeps the labels by name."""

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
    api: client.ApiClient, resource: WatchedResource = SERVICES, pace: WatchTimings = QUICK
) -> AsyncIterator[tuple[Reflector, Kept]]:
    kept = Kept()
    reflector = Reflector(api, resource, kept, timings=pace)
    task = asyncio.create_task(reflector.run())
    try:
        yield reflector, kept
        assert not task.done(), "a reflector never ends by itself"
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_what_is_there_and_what_happens_then(services: Collection, api: client.ApiClient) -> None:
    """The list first, then each change; synced only after the list."""
    services.put(item("first", app="a"))
    async with following(api) as (reflector, kept):
        assert not reflector.synced
        await until(lambda: reflector.synced, "the list")
        assert kept.labels == {"first": {"app": "a"}}
        services.put(item("second"))
        services.put(item("first", app="b"))
        await until(lambda: kept.labels == {"first": {"app": "b"}, "second": {}}, "both changes")
        services.remove("web/first")
        await until(lambda: kept.labels == {"second": {}}, "the deletion")
        assert (kept.lists, reflector.failing_since) == (1, None)


async def test_long_lists_come_in_pages(services: Collection, api: client.ApiClient) -> None:
    """No answer holds more than 500 objects."""
    for number in range(1201):
        services.put(item(f"service-{number}"))
    async with following(api) as (reflector, kept):
        await until(lambda: reflector.synced, "the list")
        assert len(kept.labels) == 1201
    lists = [query for query in services.queries if "watch" not in query]
    assert [query["limit"] for query in lists] == ["500"] * 3
    assert ["continue" in query for query in lists] == [False, True, True]


async def test_only_what_is_needed_is_asked_for(server: FakeApiServer, api: client.ApiClient) -> None:
    """Metadata without spec and status, without pods that have ended; bookmarks keep the version fresh."""
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


async def test_a_watch_that_ends_goes_on_from_where_it_was(
    server: FakeApiServer, services: Collection, api: client.ApiClient
) -> None:
    """Without another list, from the last event or bookmark."""
    async with following(api, timings=WatchTimings(watch=1.0, first_retry=0.01)) as (reflector, kept):
        await until(lambda: services.watching, "the watch")
        services.bookmark()
        version = str(services.version)
        await until(lambda: any(query.get("resourceVersion") == version for query in services.queries), "another watch")
        services.put(item("late"))
        await until(lambda: "late" in kept.labels, "an event of the later watch")
        assert (kept.lists, reflector.failing_since) == (1, None)
    assert server.fail is None


async def test_history_that_is_gone_is_made_up_for_by_a_list(services: Collection, api: client.ApiClient) -> None:
    """HTTP 410: what vanished meanwhile is dropped, what is new is there."""
    services.put(item("old"))
    async with following(api, timings=WatchTimings(watch=1.0, first_retry=0.01)) as (_, kept):
        await until(lambda: services.watching, "the watch")
        await until(lambda: not services.watching, "its end")
        services.remove("web/old")
        services.put(item("new"))
        services.compact()
        await until(lambda: kept.labels == {"new": {}}, "another list")
        assert kept.lists >= 2


async def test_a_list_that_expires_half_way_begins_again(services: Collection, api: client.ApiClient) -> None:
    """The continue token of a page may be too old (410 as the answer itself)."""
    for number in range(600):
        services.put(item(f"service-{number}"))
    first = services.answer

    async def then_expired(request: Any) -> Any:
        answer = await first(request)
        if len(services.queries) == 1:
            services.compact()
        return answer

    services.answer = then_expired  # type: ignore[method-assign]  # between two pages
    async with following(api) as (reflector, kept):
        await until(lambda: reflector.synced, "a whole list")
        assert len(kept.labels) == 600


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
async def test_nonsense_in_a_watch_ends_no_one(line: bytes, services: Collection, api: client.ApiClient) -> None:
    """However strange or long it is: the resource is listed anew, and followed on."""
    async with following(api) as (reflector, kept):
        await until(lambda: services.watching, "the watch")
        services.say(line)
        await until(lambda: kept.lists > 1 and services.watching, "another list")
        services.put(item("after"))
        await until(lambda: "after" in kept.labels and reflector.failing_since is None, "what came after it")


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
async def test_a_list_that_is_none_is_a_failure_that_may_pass(
    answer: bytes, server: FakeApiServer, api: client.ApiClient
) -> None:
    """It never counts as an empty one: that would take all names from everyone."""
    server.fail = (200, answer)
    async with following(api) as (reflector, _):
        await until(lambda: reflector.failing_since is not None, "the failure")
        assert not reflector.synced
        server.fail = None
        await until(lambda: reflector.synced and reflector.failing_since is None, "the recovery")


async def test_the_api_server_goes_away_and_comes_back(server: FakeApiServer, api: client.ApiClient) -> None:
    """What is known stays; it tells since when it fails; afterwards it catches up."""
    services = server.collection("services")
    services.put(item("kept"))
    async with following(api) as (reflector, kept):
        await until(lambda: services.watching, "the watch")
        server.fail = (503, b"{}")
        services.say(b"{")
        await until(lambda: reflector.failing_since is not None, "the failure")
        services.remove("web/kept")
        assert kept.labels == {"kept": {}}
        assert reflector.synced
        server.fail = None
        await until(lambda: kept.labels == {}, "what happened meanwhile")
        assert reflector.failing_since is None


async def test_an_api_server_that_asks_for_time_gets_it(server: FakeApiServer, api: client.ApiClient) -> None:
    """429 with Retry-After: no second request before that, however impatient the pace."""
    server.fail, server.fail_headers = (429, b"{}"), {"Retry-After": "7"}
    naps: list[float] = []
    asleep = asyncio.Event()

    async def nap(seconds: float) -> None:
        naps.append(seconds)
        asleep.set()
        await asyncio.Event().wait()

    kept = Kept()
    reflector = Reflector(api, SERVICES, kept, timings=QUICK, sleep=nap)
    task = asyncio.create_task(reflector.run())
    await asleep.wait()
    task.cancel()
    await asyncio.wait([task])
    assert naps == [7.0]


async def test_watches_that_are_cut_off_at_once_are_asked_for_less_often(
    services: Collection, api: client.ApiClient
) -> None:
    """A proxy that ends long requests must not be hammered: the pauses grow."""
    services.breaking = True
    naps: list[float] = []
    enough = asyncio.Event()

    async def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 8:
            enough.set()
            await asyncio.Event().wait()

    reflector = Reflector(api, SERVICES, Kept(), timings=WatchTimings(first_retry=0.1, longest_retry=5.0), sleep=nap)
    task = asyncio.create_task(reflector.run())
    await enough.wait()
    task.cancel()
    await asyncio.wait([task])
    assert naps[-1] >= 2.5
    assert naps[0] <= 0.2


async def test_a_silent_watch_is_replaced(services: Collection, api: client.ApiClient) -> None:
    """A connection whose other end has vanished says nothing for ever; bookmarks would have come."""
    async with following(api, timings=WatchTimings(silence=0.05, first_retry=0.01)) as (reflector, kept):
        await until(lambda: sum("watch" in query for query in services.queries) >= 3, "further watches")
        assert kept.lists == 1
        assert (reflector.failing_since, reflector._failures) == (None, 0)
