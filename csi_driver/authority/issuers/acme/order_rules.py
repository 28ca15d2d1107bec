"""What becomes of the state when a pod asks, and as time passes: pure rules."""

from __future__ import annotations

import dataclasses

from csi_driver.authority.issuers.acme.problems import refusal
from csi_driver.authority.issuers.acme.state import MOST_ORDERS, OrderRecord, State, names_id
from csi_driver.core.errors import CertmountError, Fault, Reason

_KEPT_S = 3600.0
"""Finished certificates wait as long for the node that asked: it tries again within minutes."""
_GIVEN_UP_S = 2 * 3600.0
"""Orders that nobody has asked for in so long are of pods that are gone."""
_ASKED_STEP_S = 600.0
"""So the store is not written for every question of a waiting node."""
_BLOCK_REMEMBERED_S = 86400.0
"""After its end, for the failures it has counted."""


def entered(state: State, own: str, names: tuple[str, ...], csr: bytes, now: float) -> State:
    """With the order in it: the one that is there, or a new one.

    Raises:
        CertmountError: where the CA is not to be asked about these names yet, or no further order is taken.
    """
    known, live = state.order(own), state.live_certificate(own)
    if known is not None and known.is_open:
        stale = now - known.asked_at > _ASKED_STEP_S
        return state.with_order(dataclasses.replace(known, asked_at=now)) if stale else state
    if known is not None and known.finished_at and live is not None and now < live.renew_at:
        return state
    if block := state.block(names, now):
        raise refusal(block, names)
    if sum(one.is_open for one in state.orders) >= MOST_ORDERS:
        problem = f"{MOST_ORDERS} orders are open, which is as many as are kept"
        raise CertmountError(Reason.AUTHORITY_OVERLOADED, Fault("issuer", problem))
    left_behind = known.proofs if known is not None else ()
    record = OrderRecord(own, names, csr, now, now, replaces=_replaced(state, names, now), proofs=left_behind)
    return _with_room(state).with_order(record)


def tidied(state: State, now: float) -> State:
    """Without what nobody needs any more; what still has proofs to remove stays."""
    orders = []
    for one in state.orders:
        abandoned = one.is_open and one.lease_until <= now and now - one.asked_at > _GIVEN_UP_S
        order = dataclasses.replace(one, given_up=True, retry_at=0.0) if abandoned else one
        over = order.given_up or (order.finished_at and now - order.finished_at > _KEPT_S)
        if order.proofs or not over:
            orders.append(order)
    return dataclasses.replace(
        state,
        orders=tuple(orders),
        blocks=tuple(one for one in state.blocks if now - one.until < _BLOCK_REMEMBERED_S),
        live=tuple(one for one in state.live if now < one.not_after),
    )


def _replaced(state: State, names: tuple[str, ...], now: float) -> str:
    """The certificate that an order renews, if one is due: CAs count such orders less (RFC 9773 section 5)."""
    taken = {one.replaces for one in state.orders if one.is_open}
    due = [
        one
        for one in state.live
        if one.renew_at <= now and one.names_id == names_id(names) and one.certificate_id not in taken
    ]
    return min(due, key=lambda one: one.renew_at).certificate_id if due else ""


def _with_room(state: State) -> State:
    """Without the oldest finished orders, where another would be one too many."""
    finished = sorted(
        (one for one in state.orders if not one.is_open and not one.proofs), key=lambda one: one.finished_at
    )
    for one in finished[: max(len(state.orders) + 1 - MOST_ORDERS, 0)]:
        state = state.without_order(one.id)
    return state
