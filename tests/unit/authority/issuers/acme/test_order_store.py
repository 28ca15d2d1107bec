"""Replicas that share a store: no change is lost, whoever else writes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.authority.issuers.acme.order_store import LeaseLost, OrderBook
from csi_driver.authority.issuers.acme.state import MOST_BYTES, State
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored_secrets import StoredSecrets
from tests.unit.authority.clock import Clock
from tests.unit.authority.issuers.acme.samples import record


class CountingStore(DirectoryStore):
    """Counts its reads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "acme.json")
        self.loads = 0

    async def load(self) -> StoredSecrets:
        self.loads += 1
        return await super().load()

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        await asyncio.sleep(0)
        return await super().save(values, based_on)


async def _added(book: OrderBook, name: str) -> None:
    await book.change(lambda state: state.with_order(record(id=name)))


async def test_changes_of_several_replicas_add_up(tmp_path: Path) -> None:
    """Twenty orders by four replicas at once are twenty orders; what else lies in the store stays."""
    clock = Clock()
    store = CountingStore(tmp_path)
    assert await store.save({"account.json": Secret(b"key")}, await store.load())
    books = [OrderBook(store, clock) for _ in range(4)]
    names = [str(number) for number in range(20)]
    await asyncio.gather(*(_added(books[index % 4], name) for index, name in enumerate(names)))
    assert {order.id for order in (await OrderBook(store, clock).read()).orders} == set(names)
    assert (await store.load()).values["account.json"] == Secret(b"key")


async def test_reading_costs_one_look_a_second(tmp_path: Path) -> None:
    """However many ask at once."""
    clock, store = Clock(), CountingStore(tmp_path)
    book = OrderBook(store, clock)
    await asyncio.gather(*(book.read() for _ in range(50)))
    assert store.loads == 1
    clock.forward(1.0)
    await asyncio.gather(*(book.read() for _ in range(50)))
    assert store.loads == 2


async def test_only_the_holder_changes_an_order(tmp_path: Path) -> None:
    """Who has lost the lease learns it, and changes nothing."""
    book = OrderBook(CountingStore(tmp_path), Clock())
    await book.change(lambda state: state.with_order(record(holder="you")))
    for order_id in (record().id, "unknown"):
        with pytest.raises(LeaseLost):
            await book.change_order(order_id, "me", lambda order: replace(order, url="x"))
    assert (await book.change_order(record().id, "you", lambda order: replace(order, url="x"))).url == "x"


async def test_there_is_an_end(tmp_path: Path) -> None:
    """A store that would become larger than a Secret may be is not written; what is in it stays."""
    book = OrderBook(CountingStore(tmp_path), Clock())
    await book.change(lambda state: state.with_order(record()))
    with pytest.raises(CertmountError, match="is full") as refusal:
        await book.change(lambda state: state.with_order(record(id="large", csr=bytes(MOST_BYTES))))
    assert refusal.value.reason is Reason.AUTHORITY_OVERLOADED
    assert [order.id for order in (await book.read(0.0)).orders] == [record().id]


async def test_waiting_ends_with_a_change(tmp_path: Path) -> None:
    """At once, and not at the end of the time."""
    book = OrderBook(CountingStore(tmp_path), Clock())
    waiting = asyncio.ensure_future(book.wait(60))
    await asyncio.sleep(0)
    await book.change(lambda _: State((record(),)))
    await asyncio.wait_for(waiting, 5)
