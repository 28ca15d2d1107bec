"""Reads and changes the state that all replicas share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from csi_driver.authority.issuers.acme.state import MAX_BYTES, AcmeState, OrderRecord, decode, encode
from csi_driver.authority.storage import Store, Values, update
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored_secrets import StoredSecrets

_VALUE = "orders.json"
_ATTEMPTS = 50


class LeaseLost(Exception):
    """Another replica processes the order now."""


class OrderStore:
    """The state of one issuer: changed with compare-and-swap, read at most once a second."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._lock = asyncio.Lock()
        self._known = AcmeState()
        self._read_at = -1.0
        self._changed = asyncio.Event()

    @property
    def known(self) -> AcmeState:
        return self._known

    async def read(self, max_age_s: float = 1.0) -> AcmeState:
        """Return a state that is at most ``max_age_s`` old; raise CertmountError if the store can't be read."""
        called_at = self._clock()
        if not self._is_fresh(max_age_s):
            async with self._lock:
                # Another caller may have read the store while this one waited.
                if not self._is_fresh(max_age_s) and not self._read_at > called_at:
                    self._remember(self._decode(await self._store.load()))
        return self._known

    async def change(self, step: Callable[[AcmeState], AcmeState]) -> AcmeState:
        """Replace the state with the result of ``step``, which may run again; raise CertmountError, or as ``step``."""

        async def replace(stored: StoredSecrets) -> tuple[Values | None, AcmeState]:
            before = self._decode(stored)
            after = step(before)
            return None if after == before else {**stored.values, _VALUE: self._encode(after)}, after

        async with self._lock:
            state = await update(self._store, replace, _ATTEMPTS)
            self._remember(state)
        return state

    async def change_order(self, order_id: str, holder: str, step: Callable[[OrderRecord], OrderRecord]) -> OrderRecord:
        state = await self.change(lambda state: state.with_order(step(held_order(state, order_id, holder))))
        order = state.order(order_id)
        if order is None:
            raise LeaseLost
        return order

    async def wait(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _is_fresh(self, max_age_s: float) -> bool:
        return 0 <= self._clock() - self._read_at < max_age_s

    def _encode(self, state: AcmeState) -> Secret[bytes]:
        content = encode(state)
        if len(content) > MAX_BYTES:
            problem = f"is full with {len(state.orders)} orders, {len(content)} bytes"
            fault = Fault(self._store.name, problem, "finished orders expire within an hour")
            raise CertmountError(Reason.AUTHORITY_OVERLOADED, fault)
        return Secret(content)

    def _decode(self, stored: StoredSecrets) -> AcmeState:
        value = stored.values.get(_VALUE)
        return AcmeState() if value is None else decode(value.reveal(), self._store.name)

    def _remember(self, state: AcmeState) -> None:
        self._read_at = self._clock()
        if state != self._known:
            self._known = state
            self._changed.set()
            self._changed = asyncio.Event()


def held_order(state: AcmeState, order_id: str, holder: str) -> OrderRecord:
    order = state.order(order_id)
    if order is None or order.holder != holder:
        raise LeaseLost
    return order
