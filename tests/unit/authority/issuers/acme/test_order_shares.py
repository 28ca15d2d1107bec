"""One tenant can use up only its own share of an ACME issuer, whatever the replica, and what it writes is bounded in bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.authority.issuers.acme.order_rules import after_problem, claim_orders, request_order
from csi_driver.authority.issuers.acme.order_shares import (
    MAX_BACKOFF_BYTES,
    MAX_CERTIFICATE_BYTES,
    MAX_FAILURES,
    MAX_ORDER_BYTES,
    MAX_ORDERS,
    MAX_PROCESSED,
    make_room,
    with_backoff,
    with_certificate,
)
from csi_driver.authority.issuers.acme.state import (
    MAX_BYTES,
    AcmeState,
    ChallengeRecord,
    OrderRecord,
    decode,
    encode,
    names_id,
)
from csi_driver.core.errors import CertmountError, Reason
from tests.unit.authority.issuers.acme.samples import NOW, backoff, certificate, order

VICTIM = order(id="victim", names=("victim.example.test",), account="bank/app")


def flood(state: AcmeState, account: str, count: int, *, csr: bytes = b"csr", names: int = 1) -> AcmeState:
    """Return the state after an account requested this many orders, as far as they are allowed."""
    for number in range(count):
        own = tuple(f"n{number}-{index}.{account.replace('/', '.')}.test" for index in range(names))
        requested = order(id=f"{account} {number}", account=account, csr=csr, names=own)
        try:
            state = request_order(state, requested, NOW)
        except CertmountError as error:
            assert error.reason in (Reason.SHARE_EXCEEDED, Reason.AUTHORITY_OVERLOADED)
    return state


def refused(state: AcmeState, account: str, csr: bytes = b"csr") -> str:
    with pytest.raises(CertmountError) as failure:
        request_order(state, order(id="one more", names=("more.test",), account=account, csr=csr), NOW)
    assert failure.value.reason is Reason.SHARE_EXCEEDED
    return str(failure.value)


def test_flood_of_orders_is_refused_to_its_account_alone() -> None:
    state = flood(AcmeState(), "shop/web", MAX_ORDERS)
    held = len(state.orders)
    assert MAX_ORDERS // 6 < held <= MAX_ORDERS // 3
    assert "; wait until some of them end" in refused(state, "shop/web")
    assert request_order(state, VICTIM, NOW).order("victim") is not None


@pytest.mark.parametrize("accounts", [1, 5, 20])
def test_namespace_with_many_accounts_leaves_room_for_others(accounts: int) -> None:
    state = AcmeState()
    for number in range(accounts):
        state = flood(state, f"shop/web-{number}", MAX_ORDERS)
    assert len(state.orders) <= MAX_ORDERS // 2 + 1
    state = flood(state, "bank/app", 5)
    assert sum(one.requester == "service account bank/app" for one in state.orders) == 5


def test_refusal_names_the_owner_what_it_holds_and_the_capacity() -> None:
    orders = tuple(order(id=str(number), account="shop/web", csr=b"") for number in range(70))
    text = refused(AcmeState(tuple(replace(one, names=()) for one in orders)), "shop/web")
    expected = "holds 70 of 200 open orders of the issuer and requests 1 more, which exceeds its share"
    assert text == f"ShareExceeded: service account shop/web: {expected}; wait until some of them end"


def test_large_orders_use_up_the_share_of_bytes() -> None:
    """A CSR can have 64 KiB, and an order a hundred names."""
    state = flood(AcmeState(), "shop/web", 20, csr=bytes(10_000))
    state = flood(state, "shop/web", 20, csr=bytes(10_000), names=100)
    assert 0 < sum(one.size for one in state.orders) <= MAX_ORDER_BYTES / 3
    assert "bytes of open orders" in refused(state, "shop/web", csr=bytes(10_000))
    assert request_order(state, VICTIM, NOW).order("victim") is not None


@pytest.mark.parametrize("count", [1, 100])
def test_size_of_an_order_is_no_less_than_its_encoded_record(count: int) -> None:
    names = tuple(f"{'a' * 60}{number}.example.test" for number in range(count))
    challenges = [
        ChallengeRecord("dns-01", n, "t" * 43, "v" * 43, f"_acme-challenge.{n}.", "example.test.") for n in names
    ]
    requested = order(names=names, csr=bytes(range(200)) * 5, url="https://ca/" + "o" * 50, problem="p" * 400)
    unique = bytes(range(256)) * 5
    finished = replace(requested, chain=(unique,), finished_at=NOW, problem="")
    for one in (requested.with_challenges(challenges), finished):
        assert len(encode(AcmeState((one,)))) <= one.size
    assert finished.size <= requested.size


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2000)), max_size=60))
def test_finished_orders_of_the_largest_account_make_room(orders: list[tuple[str, int]]) -> None:
    """The order that finished last stays, also if its account has the most."""
    records = tuple(
        OrderRecord(
            str(number),
            ("x.test",),
            bytes(size * 20),
            NOW,
            NOW,
            finished_at=NOW + number,
            requester=f"service account {name}/x",
        )
        for number, (name, size) in enumerate(orders)
    )
    state = make_room(AcmeState(records))
    assert sum(one.size for one in state.orders) <= MAX_ORDER_BYTES
    removed = [one for one in records if one not in state.orders]
    kept_by_others = {one.requester for one in state.orders}
    for one in removed:
        assert one.requester in kept_by_others or max(
            sum(r.requester == a.requester for r in records) for a in removed
        ) == sum(r.requester == one.requester for r in records)


def test_finished_orders_of_one_tenant_never_remove_those_of_another() -> None:
    finished = [order(id="victim", finished_at=NOW - 1000, account="bank/app")]
    finished += [order(id=str(number), finished_at=NOW, account="shop/web") for number in range(2 * MAX_ORDERS)]
    state = make_room(AcmeState(tuple(finished)))
    assert len(state.orders) <= MAX_ORDERS
    assert state.order("victim") is not None


def test_failed_orders_of_one_tenant_stop_only_its_own_orders() -> None:
    """A CA limits failures of the whole account."""
    state = AcmeState()
    for number in range(MAX_FAILURES):
        failed = order(id=str(number), names=(f"{number}.test",), account="shop/web")
        try:
            state = request_order(state, failed, NOW)
        except CertmountError:
            break
        state = after_problem(state, failed, AcmeProblem("unauthorized", "no record", 403), NOW)
    assert len(state.backoffs) == MAX_FAILURES // 3
    assert "30 of 90 orders that failed in the last hour" in refused(state, "shop/web")
    assert request_order(state, VICTIM, NOW).order("victim") is not None
    later = request_order(state, order(id="later", names=("more.test",), account="shop/web"), NOW + 3601)
    assert later.order("later") is not None


def test_slow_orders_of_one_tenant_leave_places_of_every_replica_to_others() -> None:
    slow = (order(id=str(number), names=(f"{number}.test",), account="shop/web") for number in range(60))
    state = AcmeState(tuple(slow))
    for replica in ("one", "two"):
        state = claim_orders(state, replica, NOW, 60)
        assert sum(one.holder == replica for one in state.orders) == MAX_PROCESSED // 3
    state = claim_orders(request_order(state, VICTIM, NOW), "one", NOW, 60)
    assert state.orders[-1].holder == "one"
    assert claim_orders(state, "one", NOW + 1, 60) == state


def test_backoffs_and_certificates_of_one_tenant_never_remove_those_of_another() -> None:
    state = AcmeState().with_backoff(backoff(names_id="victim", account="bank/app"))
    state = state.with_certificate(certificate(order_id="victim", account="bank/app"))
    for number in range(700):
        state = with_backoff(state, backoff(names_id=names_id([str(number)]), text="x" * 400, account="shop/web"))
        state = with_certificate(state, certificate(order_id=str(number), certificate_id="", account="shop/web"))
    assert state.backoffs[0].names_id == "victim"
    assert state.certificates[0].order_id == "victim"
    assert state.backoffs[-1].names_id == names_id(["699"])
    assert state.certificates[-1].order_id == "699"
    assert sum(one.size for one in state.backoffs) <= MAX_BACKOFF_BYTES
    assert sum(one.size for one in state.certificates) <= MAX_CERTIFICATE_BYTES


def test_state_that_tenants_fill_together_can_be_stored() -> None:
    state = AcmeState()
    for number in range(150):
        account = f"{number:063d}/{'s' * 253}"
        state = flood(state, account, 2)
        state = with_backoff(state, backoff(names_id=str(number), text="x" * 400, account=account))
        for index in range(4):
            state = with_certificate(state, certificate(order_id=f"{number} {index}" * 4, account=account))
    assert len(encode(state)) < MAX_BYTES
    assert decode(encode(state), "store") == state


def test_secrets_of_one_namespace_leave_orders_and_records_to_others() -> None:
    """10,000 Secrets, each with its own order: their namespace has one share, and each Secret has one in it."""
    state = AcmeState().with_certificate(certificate(order_id="pod", account="shop/web"))
    state = state.with_certificate(certificate(order_id="bank", requester="secret bank/tls"))
    accepted, refusal = 0, ""
    for number in range(1000):
        requester, names = f"secret shop/s{number}", (f"{number}.test",)
        try:
            state = request_order(state, order(id=str(number), names=names, requester=requester), NOW)
            accepted += 1
        except CertmountError as error:
            refusal = str(error)
        state = with_certificate(state, certificate(order_id=f"c{number}", requester=requester))
    assert MAX_ORDERS // 3 < accepted <= MAX_ORDERS // 2
    assert refusal.startswith("ShareExceeded: namespace shop: holds ")
    assert request_order(state, VICTIM, NOW).order("victim") is not None
    assert {"pod", "bank", "c999"} <= {one.order_id for one in state.certificates}
    assert sum(one.size for one in state.certificates) <= MAX_CERTIFICATE_BYTES


def test_secret_replaces_its_own_records_before_those_of_other_secrets() -> None:
    state = AcmeState()
    for number in range(400):
        state = with_certificate(state, certificate(order_id=f"a{number}", requester=f"secret shop/s{number}"))
    others = {one.order_id for one in state.certificates} - {"a399"}
    for number in range(5):
        state = with_certificate(state, certificate(order_id=f"new{number}", requester="secret shop/s399"))
    kept = {one.order_id for one in state.certificates}
    assert others < kept
    assert "new4" in kept
    assert "a399" not in kept
