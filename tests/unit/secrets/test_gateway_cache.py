"""Gateways that cannot be read are read again, and the number of Gateways of a namespace is limited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from csi_driver.core.backoff import Backoff
from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.shares import FairShares
from csi_driver.kube.client import ApiError, invalid_response
from csi_driver.kube.tls_secrets.source_objects import TLS_ACME, TLSEntry, TLSObject
from csi_driver.secrets import gateway_cache
from csi_driver.secrets.gateway_cache import GatewayCache
from csi_driver.secrets.requests import SecretName
from csi_driver.secrets.source_table import SourceCache, SourceTable
from csi_driver.secrets.sources.annotated import SourceRules, read_annotated
from tests.support.waiting import in_background, until

UNAVAILABLE = CertmountError(Reason.API_SERVER_UNAVAILABLE, "the API server does not respond in time")


def gateway(name: str, *hosts: str, enabled: bool = True, uid: str = "1") -> TLSObject:
    """Return a Gateway; without hosts, only its metadata."""
    target = EventTarget("shop", name, f"uid-{name}-{uid}", "Gateway")
    entries = (TLSEntry("spec.listeners[0]", "tls", hosts),) if hosts else ()
    return TLSObject(target, {TLS_ACME: str(enabled).lower()}, "", entries)


class World:
    """The Gateways of a namespace, whose Secret is ``shop/tls``."""

    def __init__(self) -> None:
        self.failure: Callable[[str], CertmountError | None] = lambda _: None
        self.missing: set[str] = set()
        self.hosts = "{}.example.com"
        self.reads: list[str] = []
        self.table = SourceTable(lambda _: None, lambda *_: None)
        rules = SourceRules(frozenset(["shop"]), "internal")
        memory = FairShares("bytes", 2**20)
        sources = SourceCache[TLSObject](self.table, "gateways", memory, lambda item: read_annotated(item, rules))
        self.cache = GatewayCache(sources, self._read)
        self.cache.shares.start_list()

    async def _read(self, item: TLSObject) -> TLSObject | None:
        name = item.target.name
        self.reads.append(name)
        if (failure := self.failure(name)) is not None:
            raise failure
        return None if name in self.missing else gateway(name, self.hosts.format(name), uid=item.target.uid[-1])

    @property
    def names(self) -> set[str]:
        desired = self.table.desired(SecretName("shop", "tls"))
        return {str(name) for name in desired.names} if desired else set()

    def list_again(self, *names: str) -> None:
        self.cache.shares.start_list()
        self.cache.retain({self.cache.put(gateway(name)) for name in names})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(gateway_cache, "_READ_INTERVAL_S", 0.001)
    return World()


def hold_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read nothing again during the test."""
    monkeypatch.setattr(gateway_cache, "_RETRY", Backoff(600.0, 600.0), raising=False)


async def test_gateway_whose_first_read_fails_is_not_complete_until_it_has_been_read(world: World) -> None:
    """It is read again within seconds: until then, its Secrets could get too few names."""
    world.failure = lambda name: UNAVAILABLE if world.reads.count(name) == 1 and name == "a" else None
    world.cache.put(gateway("a"))
    world.cache.put(gateway("b"))
    async with in_background(world.cache.run()):
        await until(lambda: world.names == {"b.example.com"}, "the other Gateway")
        assert (world.cache.complete, world.cache.stuck) == (False, False)
        await until(lambda: world.names == {"a.example.com", "b.example.com"}, "the second read", 10)
        assert (world.cache.complete, world.reads) == (True, ["a", "b", "a"])


async def test_gateway_that_was_read_keeps_its_names_while_reads_fail(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_back(monkeypatch)
    world.cache.put(gateway("a"))
    async with in_background(world.cache.run()):
        await until(lambda: world.names == {"a.example.com"}, "the first read")
        world.failure = lambda _: UNAVAILABLE
        world.cache.put(gateway("a"))
        await until(lambda: len(world.reads) == 2, "the failed read")
        assert (world.names, world.cache.complete) == ({"a.example.com"}, True)


async def test_gateway_that_the_api_server_does_not_know_stays_until_the_watch_reports_its_deletion(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An API server that starts does not know the Gateway API for a short time."""
    hold_back(monkeypatch)
    world.cache.put(gateway("a"))
    async with in_background(world.cache.run()):
        await until(lambda: world.names == {"a.example.com"}, "the first read")
        world.missing = {"a", "new"}
        world.cache.put(gateway("a"))
        world.cache.put(gateway("new"))
        await until(lambda: world.reads == ["a", "a", "new"], "the reads")
        assert (world.names, world.cache.complete) == ({"a.example.com"}, False)
        world.cache.remove(gateway("new"))
        world.cache.remove(gateway("a"))
        assert (world.names, world.cache.complete) == (set(), True)


async def test_gateways_that_are_invalid_leave_nothing_to_wait_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person must change them first. They still do not count as read."""
    hold_back(monkeypatch)
    invalid = invalid_response(Reason.API_SERVER_UNAVAILABLE, "Gateway", "it is too large")
    world.failure = lambda name: invalid if name == "a" else UNAVAILABLE
    world.cache.put(gateway("a"))
    async with in_background(world.cache.run()):
        await until(lambda: world.reads, "the read")
        assert (world.cache.complete, world.cache.stuck) == (False, True)
        world.cache.put(gateway("b"))
        await until(lambda: len(world.reads) == 2, "the read")
        assert (world.cache.complete, world.cache.stuck) == (False, False)
        world.cache.remove(gateway("b"))
        world.cache.put(gateway("a"))
        assert (world.cache.complete, world.cache.stuck) == (False, False)


async def test_retries_obey_the_api_server(world: World) -> None:
    """And become less frequent."""
    delays: list[float] = []

    def call_later(delay_s: float, *_: object) -> None:
        delays.append(delay_s)

    overloaded = ApiError(Reason.API_SERVER_UNAVAILABLE, Fault("Gateway", "overloaded"), 429, 30.0)
    failures = [UNAVAILABLE, UNAVAILABLE, UNAVAILABLE, overloaded, *[UNAVAILABLE] * 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "call_later", call_later)
        for failure in failures:
            world.failure = lambda _, failure=failure: failure  # type: ignore[misc]
            world.cache.put(gateway("a"))
            await world.cache._read_next()
    assert delays == [1, 2, 4, 30, 16, 32, 60, 60, 60]


async def test_gateway_that_is_deleted_or_changed_during_a_read_is_not_stored(world: World) -> None:
    gate = asyncio.Event()
    read = world.cache.read

    async def slow(item: TLSObject) -> TLSObject | None:
        found = await read(item)
        await gate.wait()
        return found

    world.cache.read = slow
    world.cache.put(gateway("a"))
    world.cache.put(gateway("b"))
    async with in_background(world.cache.run()):
        await until(lambda: world.reads == ["a"], "the read")
        world.cache.remove(gateway("a"))
        gate.set()
        await until(lambda: world.names == {"b.example.com"}, "the other Gateway")
        gate.clear()
        world.cache.put(gateway("a"))
        await until(lambda: world.reads[-1] == "a", "the read")
        world.hosts = "new-{}.example.com"
        world.cache.put(gateway("a", uid="2"))
        assert (world.cache.complete, world.names) == (False, {"b.example.com"})
        gate.set()
        await until(lambda: world.names == {"new-a.example.com", "b.example.com"}, "the second read")
        assert (world.cache.complete, world.cache.stuck) == (True, True)


@pytest.mark.parametrize("how", ["deleted", "disabled", "gone from the list"])
async def test_gateway_beyond_the_limit_causes_another_list_when_there_is_room(
    how: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reflector lists again if the shares have room."""
    monkeypatch.setattr(gateway_cache, "MAX_GATEWAYS", 2)
    world.failure = lambda name: UNAVAILABLE if name == "a" else None
    shares = world.cache.shares
    world.list_again("a", "b", "c")
    problem = "namespace shop: has more than 2 Gateways that request certificates, so certmount ignores the others"
    assert shares.texts() == [f"ShareExceeded: {problem}"]
    async with in_background(world.cache.run()):
        await until(lambda: world.names == {"b.example.com"}, "the second Gateway")
        assert not shares.has_room
        if how == "deleted":
            world.cache.remove(gateway("a"))
        elif how == "disabled":
            world.cache.put(gateway("a", enabled=False))
        else:
            world.list_again("b", "c")
        assert (shares.refusing, shares.has_room) == (True, True)
        world.list_again("b", "c")
        await until(lambda: world.names == {"b.example.com", "c.example.com"}, "the ignored Gateway")
        assert (shares.refusing, shares.has_room, world.cache.complete) == (False, False, True)


async def test_gateways_that_are_read_again_make_no_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each list would read all of them and cause another list."""
    monkeypatch.setattr(gateway_cache, "MAX_GATEWAYS", 2)
    async with in_background(world.cache.run()):
        for count in (2, 4):
            world.list_again("a", "b", "c")
            await until(lambda: len(world.reads) == count, "the reads")  # noqa: B023  # ends in this turn
            assert (world.names, world.cache.shares.has_room) == ({"a.example.com", "b.example.com"}, False)
