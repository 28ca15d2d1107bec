"""The reflector keeps its cache current in spite of failures of the API server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable
from collections.abc import Set as AbstractSet
from typing import Any

import pytest
from structlog.testing import capture_logs

from csi_driver._proto.kubernetes_pb2 import Status
from csi_driver.kube import response_stream
from csi_driver.kube.cache_shares import CacheShares
from csi_driver.kube.connection import Api
from csi_driver.kube.metadata import Metadata
from csi_driver.kube.objects import read_metadata
from csi_driver.kube.reflector import Reflector, WatchedResource, WatchTimings
from tests.support.api_objects import encode, encode_list, envelope, frame
from tests.support.waiting import in_background, until
from tests.unit.kube.api_server import FakeApiServer
from tests.unit.kube.collection import Collection

SERVICES = WatchedResource("services", "/api/v1/services", read_metadata)
PODS = WatchedResource("pods", "/api/v1/pods", read_metadata, metadata_only=True, field_selector="status.phase!=Failed")
QUICK = WatchTimings(first_retry=0.01, longest_retry=0.05)


class LabelCache:
    """Labels by name."""

    def __init__(self, capacity: int = 2000) -> None:
        self.labels: dict[Hashable, dict[str, str]] = {}
        self.shares = CacheShares("labels", capacity)
        self.lists = 0

    def put(self, item: Metadata) -> Hashable | None:
        if item.name not in self.labels and not self.shares.take(item.namespace, 1):
            return None
        self.labels[item.name] = dict(item.labels or ())
        return item.name

    def remove(self, item: Metadata) -> None:
        if self.labels.pop(item.name, None) is not None:
            self.shares.give_back(item.namespace, 1)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        self.lists += 1
        for name in [name for name in self.labels if name not in keys]:
            del self.labels[name]
            self.shares.give_back("web", 1)


def item(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "web", "labels": labels}}


@pytest.fixture
def services(server: FakeApiServer) -> Collection:
    return server.collection("services")


@contextlib.asynccontextmanager
async def following(
    api: Api,
    resource: WatchedResource[Metadata] = SERVICES,
    timings: WatchTimings = QUICK,
    capacity: int = 2000,
) -> AsyncIterator[tuple[Reflector[Metadata], LabelCache]]:
    cache = LabelCache(capacity)
    reflector = Reflector(api, resource, cache, timings=timings)
    async with in_background(reflector.run()):
        yield reflector, cache


async def test_reflector_lists_then_applies_changes(services: Collection, api: Api) -> None:
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


async def test_reflector_lists_in_pages(services: Collection, api: Api) -> None:
    for number in range(601):
        services.put(item(f"service-{number}"))
    async with following(api) as (reflector, cache):
        await until(lambda: reflector.synced, "the list")
        assert len(cache.labels) == 601
    lists = [query for query in services.queries if "watch" not in query]
    assert [query["limit"] for query in lists] == ["250"] * 3
    assert ["continue" in query for query in lists] == [False, True, True]


async def test_reflector_requests_metadata_only(server: FakeApiServer, api: Api) -> None:
    pods = server.collection("pods")
    async with following(api, PODS) as (reflector, _):
        await until(lambda: reflector.synced and pods.watching, "the watch")
    assert pods.accepts == [
        "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
        "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
    ]
    assert {query["fieldSelector"] for query in pods.queries} == {"status.phase!=Failed"}
    assert pods.queries[1]["allowWatchBookmarks"] == "true"
    assert 200 <= int(pods.queries[1]["timeoutSeconds"]) <= 340


async def test_watch_resumes_after_it_ends(server: FakeApiServer, services: Collection, api: Api) -> None:
    async with following(api, timings=WatchTimings(watch=1.0, first_retry=0.01)) as (reflector, cache):
        await until(lambda: services.watching, "the watch")
        services.bookmark()
        version = str(services.version)
        await until(lambda: any(query.get("resourceVersion") == version for query in services.queries), "another watch")
        services.put(item("late"))
        await until(lambda: "late" in cache.labels, "an event of the later watch")
        assert (cache.lists, reflector.failing_since) == (1, None)
    assert server.fail is None


async def test_reflector_lists_again_if_history_expired(services: Collection, api: Api) -> None:
    services.put(item("old"))
    async with following(api, timings=WatchTimings(watch=1.0, first_retry=0.01)) as (_, cache):
        await until(lambda: services.watching, "the watch")
        await until(lambda: not services.watching, "the end of the watch")
        services.remove("web/old")
        services.put(item("new"))
        services.compact()
        await until(lambda: cache.labels == {"new": {}}, "another list")
        assert cache.lists >= 2


async def test_list_that_expires_between_pages_is_restarted(services: Collection, api: Api) -> None:
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
    "data",
    [
        bytes(4),
        b"\xff" * 4,
        b"\0\0\0\x01\xff",
        (2**30).to_bytes(4, "big"),
        frame("ADDED", encode({})),
        frame("ADDED", b"\xff"),
        frame("ERROR", Status(code=500).SerializeToString()),
        frame("ERROR", b""),
        frame("ADDED", b"x" * 20_000_000),
    ],
    ids=lambda data: repr(data[:40]),
)
async def test_invalid_event_causes_another_list(data: bytes, services: Collection, api: Api) -> None:
    async with following(api) as (reflector, cache):
        await until(lambda: services.watching, "the watch")
        services.send(data)
        await until(lambda: cache.lists > 1 and services.watching, "another list")
        services.put(item("after"))
        await until(lambda: "after" in cache.labels and reflector.failing_since is None, "the next event")


@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b"k8s\0",
        envelope(Status().SerializeToString(), "Status"),
        envelope(b"", "ServiceList"),
        encode_list([encode({})], "1"),
        encode_list([encode(item("x"))], "1")[:-9],
    ],
)
async def test_invalid_list_is_a_temporary_failure(answer: bytes, server: FakeApiServer, api: Api) -> None:
    """If it counted as an empty list, no pod would get the names of its Services."""
    server.fail = (200, answer)
    async with following(api) as (reflector, _):
        await until(lambda: reflector.failing_since is not None, "the failure")
        assert not reflector.synced
        server.fail = None
        await until(lambda: reflector.synced and reflector.failing_since is None, "the recovery")


async def test_cache_keeps_objects_during_an_outage(server: FakeApiServer, api: Api) -> None:
    services = server.collection("services")
    services.put(item("cache"))
    async with following(api) as (reflector, cache):
        await until(lambda: services.watching, "the watch")
        server.fail = (503, b"{}")
        services.send(bytes(4))
        await until(lambda: reflector.failing_since is not None, "the failure")
        services.remove("web/cache")
        assert cache.labels == {"cache": {}}
        assert reflector.synced
        server.fail = None
        await until(lambda: cache.labels == {}, "the deletion during the outage")
        assert reflector.failing_since is None


async def pauses_of(api: Api, timings: WatchTimings, count: int) -> list[float]:
    """Return the first pauses of a reflector, which lets no time pass."""
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == count:
            await asyncio.Event().wait()

    async with in_background(Reflector(api, SERVICES, LabelCache(), timings=timings, sleep=pause).run()):
        await until(lambda: len(pauses) == count, "the pauses")
    return pauses


async def test_reflector_waits_for_retry_after(server: FakeApiServer, api: Api) -> None:
    server.fail, server.fail_headers = (429, b"{}"), {"Retry-After": "7"}
    assert await pauses_of(api, QUICK, 1) == [7.0]


async def test_reflector_backs_off_if_watches_end_at_once(services: Collection, api: Api) -> None:
    """For example because of a proxy that ends long requests."""
    services.breaking = True
    pauses = await pauses_of(api, WatchTimings(first_retry=0.1, longest_retry=5.0), 8)
    assert pauses[-1] >= 2.5
    assert pauses[0] <= 0.2


async def test_reflector_replaces_a_watch_without_data(services: Collection, api: Api) -> None:
    """A dead connection delivers no bookmarks."""
    async with following(api, timings=WatchTimings(silence=0.05, first_retry=0.01)) as (reflector, cache):
        await until(lambda: sum("watch" in query for query in services.queries) >= 3, "further watches")
        assert cache.lists == 1
        assert (reflector.failing_since, reflector._failures) == (None, 0)


async def test_refused_objects_are_known_when_there_is_room_again(services: Collection, api: Api) -> None:
    for name in ("first", "second", "third"):
        services.put(item(name))
    async with following(api, timings=WatchTimings(watch=1.0, first_retry=0.01), capacity=4) as (reflector, cache):
        await until(lambda: reflector.synced and services.watching, "the list")
        problem = "web: holds 2 of 4 labels and requests 1 more, which exceeds its share"
        texts = [f"ShareExceeded: {problem}; wait until some of them end"]
        assert (set(cache.labels), cache.shares.texts()) == ({"first", "second"}, texts)
        services.remove("web/first")
        await until(lambda: set(cache.labels) == {"second", "third"}, "another list")
        assert (cache.lists, cache.shares.refusing, reflector.failing_since) == (2, False, None)


async def test_object_that_is_too_large_is_omitted(
    services: Collection, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_stream, "MAX_OBJECT_BYTES", 1000)
    services.put(item("large") | {"metadata": {**item("large")["metadata"], "annotations": {"a": "x" * 1000}}})
    services.put(item("small"))
    async with following(api) as (reflector, cache):
        await until(lambda: reflector.synced, "the list")
        assert (set(cache.labels), reflector.failing_since) == ({"small"}, None)


async def test_responses_are_not_compressed(services: Collection, api: Api) -> None:
    """A small compressed response could have a thousand times as many bytes."""
    async with following(api) as (reflector, _):
        await until(lambda: reflector.synced and services.watching, "the watch")
    assert services.encodings == ["identity", "identity"]


async def test_forbidden_list_is_logged_in_the_words_of_the_api_server(server: FakeApiServer, api: Api) -> None:
    """And without a reason: nothing is unavailable."""
    server.fail = (403, b'{"kind":"Status","message":"services is forbidden: User \\"x\\" cannot list resource"}')
    with capture_logs() as logs:
        async with following(api) as (reflector, _):
            await until(lambda: reflector.failing_since is not None, "the failure")
    (failed,) = [line for line in logs if line["event"] == "watch failed"]
    problem = 'the API server rejects the request: HTTP 403: services is forbidden: User "x" cannot list resource'
    assert failed["error"] == f"services: {problem}"
