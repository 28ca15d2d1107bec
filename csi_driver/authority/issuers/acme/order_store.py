"""The store as all replicas see it: changed by compare-and-swap, read at most once a second."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable

from csi_driver.authority.issuers.acme.state import MOST_BYTES, OrderRecord, State, decode, encode
from csi_driver.authority.storage import Store
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored_secrets import StoredSecrets

_VALUE = "orders.json"
_MOST_ATTEMPTS = 50
"""Each lost race is another replica's change that succeeded, so losing so often in a row means something else is wrong."""


class LeaseLost(Exception):
    """Another replica works on the order now."""


class OrderBook:
    """The state of one issuer."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._changing = asyncio.Lock()
        self._known = State()
        self._read_at = -1.0
        self._changed = asyncio.Event()

    @property
    def known(self) -> State:
        """As last read or written here."""
        return self._known

    async def read(self, max_age_s: float = 1.0) -> State:
        """No older than ``max_age_s``; raises CertmountError where the store can't be read."""
        asked_at = self._clock()
        if not self._is_fresh(max_age_s):
            async with self._changing:
                # Whoever waited for another's reading has what was read meanwhile.
                if not self._is_fresh(max_age_s) and not self._read_at > asked_at:
                    self._learn(self._decode(await self._store.load()))
        return self._known

    def _is_fresh(self, max_age_s: float) -> bool:
        return 0 <= self._clock() - self._read_at < max_age_s

    async def change(self, change: Callable[[State], State]) -> State:
        """Replaces the state by what ``change`` makes of the newest one; what it raises ends the attempt.

        Raises:
            CertmountError: where the store can't be read or written, or would become too large.
        """
        async with self._changing:
            for _ in range(_MOST_ATTEMPTS):
                stored = await self._store.load()
                before = self._decode(stored)
                after = change(before)
                if after == before or await self._saved(after, stored):
                    self._learn(after)
                    return after
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(self._store.name, "others change it without a pause"))

    async def change_order(
        self, order_id: str, holder: str, change: Callable[[OrderRecord], OrderRecord]
    ) -> OrderRecord:
        """Changes one order that ``holder`` has the lease of; raises LeaseLost where it hasn't, or as :meth:`change`."""

        def changed(state: State) -> State:
            return state.with_order(change(held(state, order_id, holder)))

        found = (await self.change(changed)).order(order_id)
        if found is None:
            raise LeaseLost
        return found

    async def wait(self, timeout_s: float) -> None:
        """Until something has changed here, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def _saved(self, state: State, based_on: StoredSecrets) -> bool:
        content = encode(state)
        if len(content) > MOST_BYTES:
            problem = f"is full: {len(state.orders)} orders, {len(content)} bytes"
            raise CertmountError(
                Reason.AUTHORITY_OVERLOADED, Fault(self._store.name, problem, "some end within the hour")
            )
        return await self._store.save({**based_on.values, _VALUE: Secret(content)}, based_on)

    def _decode(self, stored: StoredSecrets) -> State:
        value = stored.values.get(_VALUE)
        return State() if value is None else decode(value.reveal(), self._store.name)

    def _learn(self, state: State) -> None:
        self._read_at = self._clock()
        if state != self._known:
            self._known = state
            self._changed.set()
            self._changed = asyncio.Event()


def held(state: State, order_id: str, holder: str) -> OrderRecord:
    """The order, if ``holder`` works on it; raises LeaseLost."""
    order = state.order(order_id)
    if order is None or order.holder != holder:
        raise LeaseLost
    return order


def claim(state: State, holder: str, now: float, lease_s: float, most: int) -> State:
    """With the leases that ``holder`` has renewed, and up to ``most`` in all taken: of orders that nobody works on and whose time has come."""
    mine = sum(order.holder == holder for order in state.orders)
    orders = []
    for order in state.orders:
        unfinished = order.is_open or order.proofs
        if order.holder == holder and unfinished:
            # Renewed at half time, so that a store is not written for each of a few seconds.
            due = order.lease_until - now < lease_s / 2
            orders.append(dataclasses.replace(order, lease_until=now + lease_s) if due else order)
        elif unfinished and order.lease_until <= now and order.retry_at <= now and mine < most:
            mine += 1
            orders.append(dataclasses.replace(order, holder=holder, lease_until=now + lease_s))
        else:
            orders.append(order)
    return dataclasses.replace(state, orders=tuple(orders))


def released(state: State, holder: str) -> State:
    """Without the leases of ``holder``, which goes: others need not wait for their end."""
    orders = tuple(
        dataclasses.replace(order, holder="", lease_until=0.0) if order.holder == holder else order
        for order in state.orders
    )
    return dataclasses.replace(state, orders=orders)
