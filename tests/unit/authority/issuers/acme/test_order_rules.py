"""What becomes of the orders when pods ask, and as time passes."""

from __future__ import annotations

import pytest

from csi_driver.authority.issuers.acme.order_store import claim, released
from csi_driver.authority.issuers.acme.order_rules import entered, tidied
from csi_driver.authority.issuers.acme.state import MOST_ORDERS, State
from csi_driver.core.errors import CertmountError, Reason
from tests.unit.authority.issuers.acme.samples import NAMES, NOW, PROOF, block, live, record

OWN = "a" * 32
DAY = 86400.0


def _entered(state: State, now: float = NOW) -> State:
    return entered(state, OWN, NAMES, b"csr", now)


def test_the_first_question_makes_an_order_and_others_find_it() -> None:
    """One order for each key and names, however often it is asked for."""
    state = _entered(State())
    assert [order.id for order in state.orders] == [OWN]
    assert _entered(state, NOW + 60) == state


def test_a_finished_certificate_is_given_until_it_is_to_be_renewed() -> None:
    """The same certificate again before, a new order after its moment; that one says whom it replaces."""
    done = State((record(finished_at=NOW, chain=(b"leaf",)),)).with_live(live(renew_at=NOW + DAY))
    assert _entered(done, NOW + DAY - 1) == done
    again = _entered(done, NOW + DAY).order(OWN)
    assert again is not None
    assert again.is_open
    assert again.replaces == "c.d"


def test_two_orders_do_not_replace_the_same_certificate() -> None:
    """Of two pods with the same names, each renews one that the other does not."""
    state = (
        State()
        .with_live(live(order_id="x", certificate_id="x", renew_at=NOW - 5))
        .with_live(live(order_id="y", certificate_id="y", renew_at=NOW - 9))
    )
    state = entered(state, "one", NAMES, b"", NOW)
    state = entered(state, "two", NAMES, b"", NOW)
    state = entered(state, "three", NAMES, b"", NOW)
    assert [order.replaces for order in state.orders] == ["y", "x", ""]


def test_refused_names_wait() -> None:
    """Whatever the key; and when the time is over they are ordered again."""
    state = State().with_block(block(until=NOW + 60, text="limit reached", reason="TooManyRequests"))
    with pytest.raises(CertmountError, match="limit reached") as refusal:
        entered(state, "another key", NAMES, b"", NOW + 59)
    assert refusal.value.reason is Reason.TOO_MANY_REQUESTS
    assert _entered(state, NOW + 60).order(OWN) is not None
    assert entered(state, "x", ("other.example.test",), b"", NOW).order("x") is not None


def test_there_is_an_end_to_what_is_kept() -> None:
    """As many open orders as the store can hold; of finished ones the oldest go first."""
    full = State(tuple(record(id=str(number)) for number in range(MOST_ORDERS)))
    with pytest.raises(CertmountError) as refusal:
        _entered(full)
    assert refusal.value.reason is Reason.AUTHORITY_OVERLOADED
    done = State(tuple(record(id=str(number), finished_at=NOW + number) for number in range(MOST_ORDERS)))
    state = _entered(done)
    assert len(state.orders) == MOST_ORDERS
    assert state.order("0") is None


def test_what_nobody_needs_is_dropped() -> None:
    """Finished orders after an hour, those of pods that are gone after two; but never what has proofs to remove."""
    state = State((record(id="done", finished_at=NOW), record(id="gone"), record(id="shown", proofs=(PROOF,))))
    assert tidied(state, NOW + 3600) == state
    later = tidied(state, NOW + 2 * 3600 + 1)
    assert [order.id for order in later.orders] == ["shown"]
    assert later.orders[0].given_up
    assert claim(later, "me", NOW + 8000, 60, 8).orders[0].holder == "me"


def test_what_is_worked_on_is_not_given_up() -> None:
    """A slow CA is no reason."""
    state = State((record(holder="me", lease_until=NOW + 3 * 3600),))
    assert tidied(state, NOW + 2.5 * 3600) == state


def test_ended_certificates_and_blocks_are_forgotten() -> None:
    """At their end; failures are counted for a day longer, so that the pause between tries grows."""
    state = State().with_live(live(not_after=NOW + 10)).with_block(block(until=NOW))
    assert tidied(state, NOW + 9) == state
    assert tidied(state, NOW + 11).live == ()
    assert tidied(state, NOW + DAY - 1).failures(NAMES) == 1
    assert tidied(state, NOW + DAY + 1) == State()


def test_leases() -> None:
    """An order is worked on by one replica until its lease ends; at half time it is renewed; a replica that leaves gives all back."""
    state = claim(State((record(id="x"), record(id="y"))), "me", NOW, 60, most=1)
    assert [order.holder for order in state.orders] == ["me", ""]
    assert claim(state, "me", NOW + 20, 60, most=1) == state
    assert claim(state, "me", NOW + 31, 60, most=1).orders[0].lease_until == NOW + 91
    assert claim(state, "you", NOW + 59, 60, most=8).orders[0].holder == "me"
    assert claim(state, "you", NOW + 60, 60, most=8).orders[0].holder == "you"
    assert claim(released(state, "me"), "you", NOW + 1, 60, most=8).orders[0].holder == "you"
    waiting = State((record(retry_at=NOW + 100),))
    assert claim(waiting, "me", NOW + 99, 60, most=8) == waiting
