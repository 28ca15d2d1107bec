"""Fair shares: no owner gets everything, and a newcomer always finds room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.shares import FairShares


def _take_all(shares: FairShares, *owners: str) -> int:
    """Take until it is refused; return what the last owner holds."""
    try:
        while True:
            shares.take(owners)
    except CertmountError:
        return shares.held(owners[-1])


def test_one_owner_gets_half_and_the_next_half_of_the_rest() -> None:
    shares = FairShares("orders", 100)
    assert [_take_all(shares, name) for name in ("first", "second", "third")] == [50, 25, 12]


def test_a_nested_owner_gets_a_share_of_its_parent() -> None:
    shares = FairShares("orders", 90)
    assert [_take_all(shares, "namespace a", f"account a/{name}") for name in ("x", "y")] == [30, 10]
    assert _take_all(shares, "namespace b", "account b/x") == 16


def test_the_refusal_names_the_owner_its_holding_and_the_capacity() -> None:
    shares = FairShares("orders in progress", 4)
    _take_all(shares, "namespace shop")
    with pytest.raises(CertmountError) as caught:
        shares.take(["namespace shop"], 1)
    assert str(caught.value) == (
        "ShareExceeded: namespace shop: holds 2 of 4 orders in progress and requests 1 more, which exceeds its share; "
        "wait until some of them end"
    )


def test_a_resource_that_many_owners_use_up_is_full() -> None:
    shares = FairShares("calls", 10, full=Reason.AUTHORITY_OVERLOADED)
    for number in range(9):
        shares.take([f"node {number}"])
    for node in ("node 1", "node new"):
        with pytest.raises(
            CertmountError, match=r"^AuthorityOverloaded: certmount: holds 9 of 10 calls and requests 1"
        ):
            shares.take([node])
    shares = FairShares("calls", 10, full=Reason.AUTHORITY_OVERLOADED)
    _take_all(shares, "node 1")
    with pytest.raises(CertmountError, match=r"^ShareExceeded: node 1: holds 5 of 10 calls"):
        shares.take(["node 1"])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 40)), max_size=60))
def test_holdings_never_exceed_the_capacity_and_nothing_is_lost(requests: list[tuple[int, int, int]]) -> None:
    shares, held = FairShares("bytes", 500), []
    for namespace, account, amount in requests:
        owners = (f"namespace {namespace}", f"account {namespace}/{account}")
        total, before = shares.total, [shares.held(owner) for owner in owners]
        try:
            shares.take(owners, amount)
            held.append((owners, amount))
        except CertmountError:
            assert (shares.total, [shares.held(owner) for owner in owners]) == (total, before)
        assert shares.total == sum(amount for _, amount in held) <= 500
        # A namespace that holds nothing always gets at least one byte for one account while three are free.
        if shares.capacity - shares.total >= 3:
            with shares.hold(("namespace new", "account new/one")):
                pass
    for owners, amount in held:
        shares.give_back(owners, amount)
    assert (shares.total, shares.held("namespace 1")) == (0, 0)
