"""Rules for orders: requests, leases and expiry."""

from __future__ import annotations

import pytest

from csi_driver.authority.issuers.acme.order_rules import claim_orders, release_orders, remove_expired, request_order
from csi_driver.authority.issuers.acme.state import MAX_ORDERS, AcmeState
from csi_driver.core.errors import CertmountError, Reason
from tests.unit.authority.issuers.acme.samples import CHALLENGE, NAMES, NOW, backoff, certificate, order

ID = "a" * 32
DAY = 86400.0


def _request(state: AcmeState, now: float = NOW) -> AcmeState:
    return request_order(state, ID, NAMES, b"csr", now)


def test_repeated_requests_share_one_order() -> None:
    state = _request(AcmeState())
    assert [one.id for one in state.orders] == [ID]
    assert _request(state, NOW + 60) == state


def test_finished_certificate_is_returned_until_its_renewal_time() -> None:
    """Then a new order replaces it (RFC 9773 section 5)."""
    finished = AcmeState((order(finished_at=NOW, chain=(b"leaf",)),)).with_certificate(certificate(renew_at=NOW + DAY))
    assert _request(finished, NOW + DAY - 1) == finished
    renewal = _request(finished, NOW + DAY).order(ID)
    assert renewal is not None
    assert renewal.is_open
    assert renewal.replaces == "c.d"


def test_two_orders_never_replace_the_same_certificate() -> None:
    state = AcmeState()
    for name, renew_at in (("x", NOW - 5), ("y", NOW - 9)):
        state = state.with_certificate(certificate(order_id=name, certificate_id=name, renew_at=renew_at))
    for order_id in ("one", "two", "three"):
        state = request_order(state, order_id, NAMES, b"", NOW)
    assert [one.replaces for one in state.orders] == ["y", "x", ""]


def test_rejected_names_wait_whatever_the_key() -> None:
    state = AcmeState().with_backoff(backoff(until=NOW + 60, text="limit reached", reason="TooManyRequests"))
    with pytest.raises(CertmountError, match="limit reached") as failure:
        request_order(state, "another key", NAMES, b"", NOW + 59)
    assert failure.value.reason is Reason.TOO_MANY_REQUESTS
    assert _request(state, NOW + 60).order(ID) is not None
    assert request_order(state, "x", ("other.example.test",), b"", NOW).order("x") is not None


def test_number_of_orders_is_limited_and_old_finished_orders_make_room() -> None:
    with pytest.raises(CertmountError) as failure:
        _request(AcmeState(tuple(order(id=str(number)) for number in range(MAX_ORDERS))))
    assert failure.value.reason is Reason.AUTHORITY_OVERLOADED
    finished = AcmeState(tuple(order(id=str(number), finished_at=NOW + number) for number in range(MAX_ORDERS)))
    state = _request(finished)
    assert len(state.orders) == MAX_ORDERS
    assert state.order("0") is None


def test_expired_orders_are_removed_but_not_their_challenges() -> None:
    """Finished orders expire after one hour, unrequested ones after two."""
    orders = (order(id="done", finished_at=NOW), order(id="gone"), order(id="published", challenges=(CHALLENGE,)))
    state = AcmeState(orders)
    assert remove_expired(state, NOW + 3600) == state
    later = remove_expired(state, NOW + 2 * 3600 + 1)
    assert [one.id for one in later.orders] == ["published"]
    assert later.orders[0].abandoned
    assert claim_orders(later, "me", NOW + 8000, 60, 8).orders[0].holder == "me"


def test_order_in_progress_does_not_expire() -> None:
    state = AcmeState((order(holder="me", lease_until=NOW + 3 * 3600),))
    assert remove_expired(state, NOW + 2.5 * 3600) == state


def test_expired_certificates_and_backoffs_are_removed() -> None:
    """A backoff stays for one more day, because the next delay depends on the number of failures."""
    state = AcmeState().with_certificate(certificate(not_after=NOW + 10)).with_backoff(backoff(until=NOW))
    assert remove_expired(state, NOW + 9) == state
    assert remove_expired(state, NOW + 11).certificates == ()
    assert remove_expired(state, NOW + DAY - 1).failures(NAMES) == 1
    assert remove_expired(state, NOW + DAY + 1) == AcmeState()


def test_one_replica_holds_an_order_until_its_lease_ends() -> None:
    """It renews the lease at half time, and releases it when it stops."""
    state = claim_orders(AcmeState((order(id="x"), order(id="y"))), "me", NOW, 60, max_held=1)
    assert [one.holder for one in state.orders] == ["me", ""]
    assert claim_orders(state, "me", NOW + 20, 60, max_held=1) == state
    assert claim_orders(state, "me", NOW + 31, 60, max_held=1).orders[0].lease_until == NOW + 91
    assert claim_orders(state, "you", NOW + 59, 60, max_held=8).orders[0].holder == "me"
    assert claim_orders(state, "you", NOW + 60, 60, max_held=8).orders[0].holder == "you"
    assert claim_orders(release_orders(state, "me"), "you", NOW + 1, 60, max_held=8).orders[0].holder == "you"
    waiting = AcmeState((order(retry_at=NOW + 100),))
    assert claim_orders(waiting, "me", NOW + 99, 60, max_held=8) == waiting
