"""Rules for orders: names that an ACME CA can sign, requests, leases and expiry, and what an error of the CA means."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.client import AcmeProblem, OrderUnusable
from csi_driver.authority.issuers.acme.config import AccountStorage, AcmeConfiguration, Dns01, Http01
from csi_driver.authority.issuers.acme.order_rules import (
    after_problem,
    backoff_error,
    claim_orders,
    order_names,
    pending_error,
    release_orders,
    remove_expired,
    request_order,
)
from csi_driver.authority.issuers.acme.state import AcmeState
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import Names, spiffe_id
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.spec import KeyType, Usage
from tests.unit.authority.issuers.acme.samples import CHALLENGE, NAMES, NOW, backoff, certificate, order
from tests.unit.core import pki

ID = "a" * 32
DAY = 86400.0


def _request(state: AcmeState, now: float = NOW) -> AcmeState:
    return request_order(state, order(created_at=now, requested_at=now), now)


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


def test_finished_certificate_that_is_not_tracked_is_returned_until_its_default_renewal_time() -> None:
    """The namespace's share of tracked certificates is used up, or another order replaced the certificate."""
    start = pki.Validity(timedelta(0), timedelta(minutes=30))
    chain = tuple(
        pki.der(pki.leaf(pki.authority("ca"), pki.key_of(KeyType.EC_P256), pki.names(*NAMES), validity=start))
    )
    issued_at = pki.NOW.timestamp()
    finished = AcmeState((order(finished_at=issued_at, chain=chain),))
    assert _request(finished, issued_at + 1199) == finished
    renewal = _request(finished, issued_at + 1201).order(ID)
    assert renewal is not None
    assert renewal.is_open


def test_two_orders_never_replace_the_same_certificate() -> None:
    state = AcmeState()
    for name, renew_at in (("x", NOW - 5), ("y", NOW - 9)):
        state = state.with_certificate(certificate(order_id=name, certificate_id=name, renew_at=renew_at))
    for order_id in ("one", "two", "three"):
        state = request_order(state, order(id=order_id), NOW)
    assert [one.replaces for one in state.orders] == ["y", "x", ""]


def test_rejected_names_wait_whatever_the_key() -> None:
    state = AcmeState().with_backoff(backoff(until=NOW + 60, text="limit reached", reason="TooManyRequests"))
    with pytest.raises(CertmountError, match="limit reached") as failure:
        request_order(state, order(id="another key"), NOW + 59)
    assert failure.value.reason is Reason.TOO_MANY_REQUESTS
    assert _request(state, NOW + 60).order(ID) is not None
    assert request_order(state, order(id="x", names=("other.example.test",)), NOW).order("x") is not None


def test_expired_orders_are_removed_but_not_their_challenges() -> None:
    """Finished orders expire after one hour, unrequested ones after two; those in progress do not."""
    busy = order(id="busy", holder="me", lease_until=NOW + 3 * 3600)
    orders = (order(id="done", finished_at=NOW), order(id="gone"), order(id="published", challenges=(CHALLENGE,)), busy)
    state = AcmeState(orders)
    assert remove_expired(state, NOW + 3600) == state
    later = remove_expired(state, NOW + 2 * 3600 + 1)
    assert [(one.id, one.abandoned) for one in later.orders] == [("published", True), ("busy", False)]
    assert claim_orders(later, "me", NOW + 8000, 60).orders[0].holder == "me"
    assert busy in remove_expired(state, NOW + 2.5 * 3600).orders


def test_expired_certificates_and_backoffs_are_removed() -> None:
    """A backoff stays for one more day, because the next delay depends on the number of failures."""
    state = AcmeState().with_certificate(certificate(not_after=NOW + 10)).with_backoff(backoff(until=NOW))
    assert remove_expired(state, NOW + 9) == state
    assert remove_expired(state, NOW + 11).certificates == ()
    assert remove_expired(state, NOW + DAY - 1).failures(NAMES) == 1
    assert remove_expired(state, NOW + DAY + 1) == AcmeState()


def test_one_replica_holds_an_order_until_its_lease_ends() -> None:
    """It renews the lease at half time, and releases it when it stops."""
    state = claim_orders(AcmeState((order(),)), "me", NOW, 60)
    assert [one.holder for one in state.orders] == ["me"]
    assert claim_orders(state, "me", NOW + 20, 60) == state
    assert claim_orders(state, "me", NOW + 31, 60).orders[0].lease_until == NOW + 91
    assert claim_orders(state, "you", NOW + 59, 60).orders[0].holder == "me"
    assert claim_orders(state, "you", NOW + 60, 60).orders[0].holder == "you"
    assert claim_orders(release_orders(state, "me"), "you", NOW + 1, 60).orders[0].holder == "you"
    waiting = AcmeState((order(retry_at=NOW + 100),))
    assert claim_orders(waiting, "me", NOW + 99, 60) == waiting


def _claimed(state: AcmeState, holder: str = "me", now: float = NOW) -> list[str]:
    return [one.id for one in claim_orders(state, holder, now, 60).orders if one.holder == holder]


def test_orders_of_an_account_with_the_same_names_take_turns() -> None:
    """The CA can return the same order for all of them. The one that is due the longest is first, whatever the replica."""
    ages = {"second": 20, "third": 10, "first": 30}
    state = AcmeState(tuple(order(id=name, created_at=NOW - age) for name, age in ages.items()))
    assert _claimed(state) == ["first"]
    state = claim_orders(state, "me", NOW, 60)
    assert _claimed(state, "you", NOW + 59) == []
    assert _claimed(state, "me", NOW + 100) == ["first"], "it renews its lease"
    assert _claimed(state, "you", NOW + 60) == ["first"], "another replica continues it"
    failed = after_problem(state, state.orders[2], AcmeProblem("", "no DNS"), NOW)
    assert _claimed(failed) == ["second"]
    assert _claimed(failed.without_order("second").without_order("third"), now=NOW + 5) == ["first"]
    assert _claimed(failed, now=NOW + 5) == ["second"], "the failed one is behind those that waited"


def test_orders_of_other_names_or_accounts_and_removals_do_not_wait() -> None:
    changes: tuple[dict[str, Any], ...] = (
        {}, {"names": ("other.test",)}, {"email": "a@example.test"},
        {"abandoned": True, "challenges": (CHALLENGE,)}, {"finished_at": NOW, "challenges": (CHALLENGE,)},
    )  # fmt: skip
    state = AcmeState(tuple(order(id=str(number), **change) for number, change in enumerate(changes)))
    assert _claimed(state) == ["0", "1", "2", "3", "4"]


def test_tenant_without_a_free_place_does_not_delay_another_with_the_same_names() -> None:
    slow = tuple(order(id=f"slow {number}", names=(f"{number}.test",), account="shop/web") for number in range(32))
    orders = (*slow, order(id="shop", account="shop/web"), order(id="bank", account="bank/app", created_at=NOW + 1))
    claimed = _claimed(AcmeState(orders))
    assert "shop" not in claimed
    assert "bank" in claimed


def test_rejected_order_ends_those_that_wait_for_it() -> None:
    """With its names, and no order at the CA or the same one. What they published remains to be removed."""
    failed = order(id="failed", url="https://ca/1", holder="me", lease_until=NOW + 60)
    ended = order(id="waits"), order(id="same", url="https://ca/1"), order(id="published", challenges=(CHALLENGE,))
    kept = (
        order(id="own", url="https://ca/2"),
        order(id="held", holder="you", lease_until=NOW + 1),
        order(id="x", names=("other.test",)),
    )
    state = after_problem(AcmeState((failed, *ended, *kept)), failed, AcmeProblem("unauthorized", "no", 403), NOW)
    assert [(one.id, one.is_open) for one in state.orders] == [
        ("own", True), ("held", True), ("x", True), ("published", False),
    ]  # fmt: skip
    with pytest.raises(CertmountError, match="no"):
        request_order(state, ended[0], NOW)


@pytest.mark.parametrize("retry_after_s, expected_s", [(7200.0, 7200), (None, 3600)])
def test_rate_limit_before_an_order_exists_applies_to_its_names(retry_after_s: float | None, expected_s: int) -> None:
    problem = AcmeProblem("rateLimited", "too many", 429, retry_after_s)
    state = after_problem(AcmeState((order(),)), order(), problem, NOW)
    assert state.order(order().id) is None
    backoff = state.backoff(NAMES, NOW + expected_s - 1)
    assert backoff is not None
    assert (backoff.reason, backoff.until) == ("TooManyRequests", NOW + expected_s)
    assert state.backoff(NAMES, NOW + expected_s) is None


@pytest.mark.parametrize(
    "problem", [AcmeProblem("rateLimited", "too many", 429, 50.0), AcmeProblem("", "busy", 503, 50.0)]
)
def test_existing_order_waits_as_long_as_the_ca_requests(problem: AcmeProblem) -> None:
    known = order(url="https://ca/1", holder="me", lease_until=NOW + 60)
    state = after_problem(AcmeState((known,)), known, problem, NOW)
    waiting = state.order(known.id)
    assert waiting is not None
    assert (waiting.retry_at, waiting.holder, waiting.url) == (NOW + 50, "", "https://ca/1")
    assert state.backoffs == ()


def test_rejected_names_are_retried_with_growing_delays() -> None:
    """At most four times in the first hour, and finally every six hours."""
    state, times, now = AcmeState(), [], NOW
    for _ in range(12):
        state = after_problem(state.with_order(order()), order(), AcmeProblem("unauthorized", "no record", 403), now)
        times.append(now - NOW)
        backoff = state.backoff(NAMES, now)
        assert backoff is not None
        now = backoff.until
    assert sum(time < 3600 for time in times) == 4
    assert times[-1] - times[-2] == 6 * 3600
    assert state.without_backoff(NAMES).failures(NAMES) == 0


@pytest.mark.parametrize(
    "code, reason",
    [
        ("rejectedIdentifier", Reason.NAME_NOT_ALLOWED),
        ("caa", Reason.NAME_NOT_ALLOWED),
        ("badCSR", Reason.NAME_NOT_ALLOWED),
        ("unauthorized", Reason.ISSUER_UNAVAILABLE),
        ("connection", Reason.ISSUER_UNAVAILABLE),
    ],
)
def test_error_contains_the_text_of_the_ca_and_the_retry_time(code: str, reason: Reason) -> None:
    state = after_problem(AcmeState((order(),)), order(), AcmeProblem(code, "its words", 403), NOW)
    backoff = state.backoff(NAMES, NOW)
    assert backoff is not None
    error = backoff_error(backoff, NAMES)
    assert error.reason is reason
    assert f"its words ({code}); the authority retries after 2027-01-15T08:05:00Z" in str(error)


def test_rejected_order_stays_until_its_challenges_are_removed() -> None:
    known = order(challenges=(CHALLENGE,), url="https://ca/1")
    remaining = after_problem(AcmeState((known,)), known, AcmeProblem("unauthorized", "no", 403), NOW).order(known.id)
    assert remaining is not None
    assert remaining.abandoned
    assert not remaining.is_open
    assert remaining.challenges == (CHALLENGE,)


@pytest.mark.parametrize(
    "problem",
    [
        AcmeProblem("", "gone", 404),
        AcmeProblem("accountDoesNotExist", "unknown", 400),
        OrderUnusable("for another key"),
    ],
)
def test_order_that_the_ca_has_lost_starts_again(problem: AcmeProblem) -> None:
    known = order(url="https://ca/1")
    state = after_problem(AcmeState((known,)), known, problem, NOW)
    restarted = state.order(known.id)
    assert restarted is not None
    assert restarted.url == ""
    assert state.backoffs == ()


def test_transient_failures_are_retried_and_reported() -> None:
    """The delay doubles from 5 s to 5 min."""
    state, delays = AcmeState((order(),)), []
    for _ in range(9):
        (known,) = state.orders
        state = after_problem(state, known, AcmeProblem("", "DNS server 192.0.2.1: does not respond in time"), NOW)
        delays.append(state.orders[0].retry_at - NOW)
    assert delays == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    error = pending_error(state.orders[0])
    assert error.reason is Reason.ISSUANCE_PENDING
    expected = "DNS server 192.0.2.1: does not respond in time; the authority retries after 2027-01-15T08:05:00Z"
    assert expected in str(error)


DNS = AcmeConfiguration(AccountStorage(directory="/x"), dns01=Dns01("127.0.0.1"))
HTTP = AcmeConfiguration(AccountStorage(directory="/x"), http01=Http01())
POD = PodIdentity(ServiceAccount("web", "edge"), "", "edge-0", "", "", "", 0)
ALL = (Usage.SERVER, Usage.CLIENT)
KEY = ec.generate_private_key(ec.SECP256R1())


def _to_sign(
    names: Names, usages: tuple[Usage, ...] = ALL, requested: RequestedCertificate | None = None
) -> IssuerRequest:
    granted = replace(names, uris=(*names.uris, spiffe_id("cluster.local", "web", "edge")))
    grant = Grant(granted, timedelta(days=1), usages, ())
    return IssuerRequest(parse_csr(build_csr(KEY, names)), grant, POD, requested)


def test_requested_dns_names_are_ordered_without_the_spiffe_id() -> None:
    assert order_names(_to_sign(pki.names("b.example.test", "*.example.test")), DNS) == (
        "*.example.test",
        "b.example.test",
    )


def test_all_unsupported_parts_are_reported_together() -> None:
    """Other kinds of names, client usages, a lifetime, and wildcards without DNS-01."""
    names = pki.names("*.example.test", "spiffe://x/y", "192.0.2.1", "a@example.test")
    requested = RequestedCertificate(names, usages=(Usage.CLIENT,), duration=timedelta(hours=1))
    with pytest.raises(CertmountError) as failure:
        order_names(_to_sign(names, requested=requested), HTTP)
    assert failure.value.reason is Reason.NAME_NOT_ALLOWED
    fields = [str(fault).split(":")[0] for fault in failure.value.faults]
    assert fields == ["spiffe", "192.0.2.1", "a@example.test", "usages", "duration", "*.example.test"]


def test_names_of_services_do_not_replace_requested_names() -> None:
    request = _to_sign(Names())
    granted = replace(request.grant, names=pki.names("shop.web.svc"))
    with pytest.raises(CertmountError, match="no DNS name is requested"):
        order_names(replace(request, grant=granted), DNS)


def test_client_only_certificates_are_rejected() -> None:
    with pytest.raises(CertmountError, match="public CAs no longer sign client certificates"):
        order_names(_to_sign(pki.names("a.example.test"), usages=(Usage.CLIENT,)), DNS)


def test_post_quantum_keys_are_rejected() -> None:
    request = _to_sign(pki.names("a.example.test"))
    post_quantum = replace(request, csr=replace(request.csr, key_type=KeyType.ML_DSA_65))
    with pytest.raises(CertmountError, match="do not sign ML-DSA-65 keys yet"):
        order_names(post_quantum, DNS)
