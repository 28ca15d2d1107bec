"""Shares of an ACME issuer, by namespace, and by service account or Secret. All replicas compute them from the state that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from csi_driver.authority.issuers.acme.state import AcmeState, NamesBackoff, OrderRecord, TrackedCertificate, names_id
from csi_driver.core.errors import Reason
from csi_driver.core.shares import FairShares

MAX_ORDERS = 200
"""Open orders of an issuer."""
MAX_ORDER_BYTES = 450 * 1024
"""Of the records of all orders in the issuer's state, including the CSR, the challenges and the certificate."""
MAX_PROCESSED = 32
"""Orders that one replica processes at the same time. Most of them wait for name servers or the CA."""
MAX_FAILURES = 90
"""Sets of names whose orders failed in an hour. Let's Encrypt allows an account 300 new orders in 3 hours."""
MAX_BACKOFF_BYTES = 80 * 1024
"""Of the records of names that must wait, because the CA rejected their last order."""
MAX_CERTIFICATE_BYTES = 200 * 1024
"""Of the records of issued certificates, whose renewal times the issuer follows (RFC 9773): about 500."""
_FAILURES_S = 3600.0


class _Record(Protocol):
    @property
    def owners(self) -> tuple[str, str]: ...

    @property
    def size(self) -> int: ...


_R = TypeVar("_R", bound=_Record)


def check_shares(state: AcmeState, order: OrderRecord, now: float) -> None:
    """Raise CertmountError ShareExceeded if a new order exceeds a share of its owners."""
    unfinished = [one for one in state.orders if one.is_unfinished and one.id != order.id]
    _shares("open orders of the issuer", MAX_ORDERS, unfinished, full=Reason.AUTHORITY_OVERLOADED).take(order.owners)
    sizes = FairShares("bytes of open orders of the issuer", MAX_ORDER_BYTES, full=Reason.AUTHORITY_OVERLOADED)
    for one in unfinished:
        sizes.count(one.owners, one.size)
    sizes.take(order.owners, order.size)
    own = names_id(order.names)  # which hold their part of the share already
    failed = [one for one in state.backoffs if now - one.failed_at < _FAILURES_S and one.names_id != own]
    _shares("orders that failed in the last hour", MAX_FAILURES, failed).take(order.owners)


def processing_shares(orders: Iterable[OrderRecord]) -> FairShares:
    """Return the shares of the orders that a replica processes at the same time, which ``orders`` use."""
    return _shares("orders in processing", MAX_PROCESSED, orders)


def make_room(state: AcmeState) -> AcmeState:
    """Remove finished orders until all fit: the oldest of the namespace that has most of them, and of the requester in it."""
    while len(state.orders) > MAX_ORDERS or sum(one.size for one in state.orders) > MAX_ORDER_BYTES:
        removable = [one for one in state.orders if not one.is_unfinished]
        if not removable:
            break
        for owner in (0, 1):
            most = Counter(one.owners[owner] for one in removable).most_common(1)[0][0]
            removable = [one for one in removable if one.owners[owner] == most]
        oldest = min(removable, key=lambda one: one.finished_at)
        state = state.without_order(oldest.id)
    return state


def with_certificate(state: AcmeState, certificate: TrackedCertificate) -> AcmeState:
    """Track the certificate; if a share is used up, instead of the oldest ones of the same requester."""
    state = state.with_certificate(certificate)
    removed = _beyond_share(state.certificates, MAX_CERTIFICATE_BYTES)
    return replace(state, certificates=tuple(one for one in state.certificates if one not in removed))


def with_backoff(state: AcmeState, backoff: NamesBackoff) -> AcmeState:
    """Add the backoff; if a share is used up, instead of the oldest ones of the same requester."""
    state = state.with_backoff(backoff)
    removed = _beyond_share(state.backoffs, MAX_BACKOFF_BYTES)
    return replace(state, backoffs=tuple(one for one in state.backoffs if one not in removed))


def _beyond_share(records: Sequence[_R], capacity: int) -> list[_R]:
    """Return what must be removed so that the last record fits: older ones of the same owners, and itself if that is not enough."""
    shares = FairShares("bytes", capacity)
    *known, new = records
    for one in known:
        shares.count(one.owners, one.size)
    removed: list[_R] = []
    replaceable = [one for one in known if _group(one) == _group(new)]
    for old in sorted(replaceable, key=lambda one: one.owners != new.owners):
        if shares.fits(new.owners, new.size):
            return removed
        shares.give_back(old.owners, old.size)
        removed.append(old)
    return removed if shares.fits(new.owners, new.size) else [*removed, new]


def _group(record: _Record) -> str:
    """Return whose records a new one can replace. A Secret owns few, so the Secrets of a namespace replace each other's."""
    namespace, requester = record.owners
    return f"secrets of {namespace}" if requester.startswith("secret ") else requester


def _shares(resource: str, capacity: int, records: Iterable[_Record], full: Reason | None = None) -> FairShares:
    shares = FairShares(resource, capacity, full)
    for one in records:
        shares.count(one.owners)
    return shares
