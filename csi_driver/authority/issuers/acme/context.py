"""What the parts of an ACME issuer share: the state that all replicas change, the account, and the solver."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from csi_driver.authority.issuers.acme.account import AcmeAccounts
from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.authority.issuers.acme.state import MAX_BYTES, AcmeState, ChallengeRecord, OrderRecord, decode, encode
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.storage import Store, Values, update
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret, StoredSecrets

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
        self.known = AcmeState()  # What this replica last read or wrote
        self._read_at = -1.0
        self._reads = 0
        self._changed = asyncio.Event()

    async def read(self, max_age_s: float = 1.0) -> AcmeState:
        """Return a state that is at most ``max_age_s`` old; raise CertmountError if the store can't be read."""
        reads = self._reads
        if not self._is_fresh(max_age_s):
            async with self._lock:
                # Another caller may have read the store while this one waited. A clock that is set back can't tell.
                if not self._is_fresh(max_age_s) and self._reads == reads:
                    self._remember(self._decode(await self._store.load()))
        return self.known

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
        self._reads += 1
        if state != self.known:
            self.known = state
            self._changed.set()
            self._changed = asyncio.Event()


def held_order(state: AcmeState, order_id: str, holder: str) -> OrderRecord:
    order = state.order(order_id)
    if order is None or order.holder != holder:
        raise LeaseLost
    return order


class ChallengeSolver(Protocol):
    """Proves control of names to the CA. Methods raise CertmountError."""

    @property
    def kind(self) -> str:
        """The challenge type, such as ``dns-01``."""

    async def check(self, names: Sequence[str]) -> None:
        """Check, without changing anything, whether the solver supports the names."""

    async def prepare(self, name: str, token: str, key_authorization: str) -> ChallengeRecord:
        """Return what to publish; change nothing."""

    async def publish(self, challenges: Sequence[ChallengeRecord]) -> None:
        """Publish the responses, and wait until the CA can see them."""

    async def unpublish(self, challenge: ChallengeRecord) -> None:
        """Remove a response, if it exists."""

    def using(self, tsig_secret: str) -> ChallengeSolver:
        """Return the solver that uses the TSIG key in this Secret; empty: the issuer's own key."""


@dataclass(frozen=True, slots=True)
class AcmeContext:
    """The configuration and the services of one issuer. ``solver`` uses the issuer's own TSIG key."""

    configuration: AcmeConfiguration
    credentials: CredentialReader
    orders: OrderStore
    accounts: AcmeAccounts
    solver: ChallengeSolver
    clock: Callable[[], float]
    holder: str  # The identity of this replica in leases
    count_order: Callable[[str], None]  # Takes "issued" or "failed"

    async def unpublish_challenges(self, order: OrderRecord) -> None:
        """Unpublish and remove all challenges of an order, also if some fail; then raise CertmountError with the faults."""
        solver = self.solver.using(order.tsig_secret)
        failed: dict[str, CertmountError] = {}
        for challenge in order.challenges:
            if challenge.zone in failed:
                continue  # The zone's server may not answer at all
            # A CA can give two orders the same authorization, and so the same response.
            others = (one for one in self.orders.known.orders if one.id != order.id and one.is_open)
            if not any(challenge in one.challenges for one in others):
                try:
                    await solver.unpublish(challenge)
                except CertmountError as error:
                    failed[challenge.zone] = error
                    continue
            remove = functools.partial(OrderRecord.without_challenge, removed=challenge)
            await self.orders.change_order(order.id, self.holder, remove)
        if failed:
            faults = (fault for error in failed.values() for fault in error.faults)
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, *faults)
