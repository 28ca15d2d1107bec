"""Several replicas share one store without losing changes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.authority.issuers.acme.context import LeaseLost, OrderStore
from csi_driver.authority.issuers.acme.state import MAX_BYTES, AcmeState
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret, StoredSecrets
from tests.unit.authority.clock import Clock
from tests.unit.authority.issuers.acme.samples import order


class CountingStore(DirectoryStore):
    """Counts how often it is read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "acme.json")
        self.loads = 0

    async def load(self) -> StoredSecrets:
        self.loads += 1
        return await super().load()

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        await asyncio.sleep(0)
        return await super().save(values, based_on)


async def test_concurrent_changes_of_several_replicas_are_all_kept(tmp_path: Path) -> None:
    """Four replicas add 20 orders at the same time; other values in the store stay."""
    clock, store = Clock(), CountingStore(tmp_path)
    assert await store.save({"account.json": Secret(b"key")}, await store.load())
    replicas = [OrderStore(store, clock) for _ in range(4)]

    async def add(replica: OrderStore, order_id: str) -> None:
        await replica.change(lambda state: state.with_order(order(id=order_id)))

    ids = [str(number) for number in range(20)]
    await asyncio.gather(*(add(replicas[index % 4], order_id) for index, order_id in enumerate(ids)))
    assert {one.id for one in (await OrderStore(store, clock).read()).orders} == set(ids)
    assert (await store.load()).values["account.json"] == Secret(b"key")


async def test_concurrent_readers_share_one_read_per_second(tmp_path: Path) -> None:
    clock, store = Clock(), CountingStore(tmp_path)
    orders = OrderStore(store, clock)
    for reads in (1, 2):
        await asyncio.gather(*(orders.read() for _ in range(50)))
        assert store.loads == reads
        clock.forward(1.0)


async def test_only_the_lease_holder_changes_an_order(tmp_path: Path) -> None:
    orders = OrderStore(CountingStore(tmp_path), Clock())
    await orders.change(lambda state: state.with_order(order(holder="you")))
    for order_id in (order().id, "unknown"):
        with pytest.raises(LeaseLost):
            await orders.change_order(order_id, "me", lambda one: replace(one, url="x"))
    assert (await orders.change_order(order().id, "you", lambda one: replace(one, url="x"))).url == "x"


async def test_state_larger_than_a_secret_is_not_saved(tmp_path: Path) -> None:
    orders = OrderStore(CountingStore(tmp_path), Clock())
    await orders.change(lambda state: state.with_order(order()))
    with pytest.raises(CertmountError, match="is full") as failure:
        await orders.change(lambda state: state.with_order(order(id="large", csr=bytes(MAX_BYTES))))
    assert failure.value.reason is Reason.AUTHORITY_OVERLOADED
    assert [one.id for one in (await orders.read(0.0)).orders] == [order().id]


async def test_wait_returns_at_a_change(tmp_path: Path) -> None:
    orders = OrderStore(CountingStore(tmp_path), Clock())
    waiting = asyncio.ensure_future(orders.wait(60))
    await asyncio.sleep(0)
    await orders.change(lambda _: AcmeState((order(),)))
    await asyncio.wait_for(waiting, 5)
