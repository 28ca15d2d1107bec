"""What a CA's word means for an order, and what an ACME CA is not asked at all."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from csi_driver.authority.issuers.acme.client import CaProblem
from csi_driver.authority.issuers.acme.problems import after_problem, after_trouble, judge, pending, refusal
from csi_driver.authority.issuers.acme.settings import AcmeSettings, Dns01, Http01, StorePlace
from csi_driver.authority.issuers.acme.state import State
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import URI, DNSName, EmailAddress, IPAddress, Names, spiffe_id
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.spec import KeyType, Usage
from tests.unit.authority.issuers.acme.samples import NAMES, NOW, PROOF, record

BY_DNS = AcmeSettings(StorePlace(folder="/x"), dns01=Dns01("127.0.0.1"))
BY_HTTP = AcmeSettings(StorePlace(folder="/x"), http01=Http01())
ALL = (Usage.SERVER, Usage.CLIENT)


def _judged(
    names: Names,
    settings: AcmeSettings = BY_DNS,
    usages: tuple[Usage, ...] = ALL,
    asked: RequestedCertificate | None = None,
) -> tuple[str, ...]:
    granted = replace(names, uris=(*names.uris, spiffe_id("cluster.local", "web", "edge")))
    return judge(names, Grant(granted, timedelta(days=1), usages, ()), asked, settings)


def _dns(*names: str) -> Names:
    return Names.of([DNSName.parse(name) for name in names])


def test_dns_names_are_ordered() -> None:
    """Those that the pod asks for; the SPIFFE ID that policy adds is not asked of the CA."""
    assert _judged(_dns("b.example.test", "*.example.test")) == ("*.example.test", "b.example.test")


def test_all_that_a_public_ca_does_not_sign_is_said_at_once() -> None:
    """Other kinds of names, usages for clients, a life of the pod's own choice, wildcards without DNS."""
    names = Names.of(
        [DNSName.parse("*.example.test")],
        [URI.parse("spiffe://x/y")],
        [IPAddress.parse("192.0.2.1")],
        [EmailAddress.parse("a@example.test")],
    )
    asked = RequestedCertificate(names, usages=(Usage.CLIENT,), duration=timedelta(hours=1))
    with pytest.raises(CertmountError) as refused:
        _judged(names, BY_HTTP, asked=asked)
    assert refused.value.reason is Reason.NAME_NOT_ALLOWED
    fields = [str(fault).split(":")[0] for fault in refused.value.faults]
    assert fields == ["spiffe", "192.0.2.1", "a@example.test", "usages", "duration", "*.example.test"]


def test_a_pod_that_names_nothing_is_told_so() -> None:
    """The names of its Services, which policy would give it, are no names of a public CA."""
    granted = Names.of([DNSName.parse("shop.web.svc")])
    with pytest.raises(CertmountError, match="no DNS name is asked for"):
        judge(Names(), Grant(granted, timedelta(days=1), ALL, ()), None, BY_DNS)
    with pytest.raises(CertmountError, match="public CAs no longer sign certificates for clients"):
        _judged(_dns("a.example.test"), usages=(Usage.CLIENT,))


def test_keys_that_no_ca_signs_for() -> None:
    """Post-quantum keys are refused before an order is spent on them."""
    names = _dns("a.example.test")
    with pytest.raises(CertmountError, match="do not sign for ML-DSA-65 keys yet"):
        judge(names, Grant(names, timedelta(days=1), ALL, ()), None, BY_DNS, KeyType.ML_DSA_65)


def test_a_limit_before_the_order_is_kept_for_the_names() -> None:
    """With the time that the CA has named, or an hour."""
    limited = CaProblem("rateLimited", "too many", 429, 7200.0)
    state = after_problem(State((record(),)), record(), limited, NOW)
    assert state.order(record().id) is None
    block = state.block(NAMES, NOW + 7199)
    assert block is not None
    assert (block.reason, block.until) == ("TooManyRequests", NOW + 7200)
    assert state.block(NAMES, NOW + 7200) is None
    unsaid = after_problem(State((record(),)), record(), CaProblem("rateLimited", "too many", 429), NOW)
    assert unsaid.block(NAMES, NOW + 3599) is not None


@pytest.mark.parametrize("problem", [CaProblem("rateLimited", "too many", 429, 50.0), CaProblem("", "busy", 503, 50.0)])
def test_an_order_that_is_open_waits(problem: CaProblem) -> None:
    """For as long as the CA asks; it is not lost, and not the names' fault."""
    order = record(url="https://ca/1", holder="me", lease_until=NOW + 60)
    state = after_problem(State((order,)), order, problem, NOW)
    waiting = state.order(order.id)
    assert waiting is not None
    assert (waiting.retry_at, waiting.holder, waiting.url) == (NOW + 50, "", "https://ca/1")
    assert state.blocks == ()


def test_failures_are_repeated_ever_more_slowly() -> None:
    """Four times in the first hour at most, and no more often than every six hours in the end."""
    state, moments, now = State(), [], NOW
    for _ in range(12):
        state = after_problem(state.with_order(record()), record(), CaProblem("unauthorized", "no record", 403), now)
        moments.append(now - NOW)
        block = state.block(NAMES, now)
        assert block is not None
        now = block.until
    assert sum(moment < 3600 for moment in moments) == 4
    assert moments[-1] - moments[-2] == 6 * 3600
    assert state.without_block(NAMES).failures(NAMES) == 0


@pytest.mark.parametrize(
    "code, reason",
    [("rejectedIdentifier", Reason.NAME_NOT_ALLOWED), ("caa", Reason.NAME_NOT_ALLOWED), ("badCSR", Reason.NAME_NOT_ALLOWED),
     ("unauthorized", Reason.ISSUER_UNAVAILABLE), ("connection", Reason.ISSUER_UNAVAILABLE)],
)  # fmt: skip
def test_what_a_pod_is_told(code: str, reason: Reason) -> None:
    """The CA's words, whether anybody has to change something, and the time at which it is asked again."""
    state = after_problem(State((record(),)), record(), CaProblem(code, "its words", 403), NOW)
    block = state.block(NAMES, NOW)
    assert block is not None
    told = refusal(block, NAMES)
    assert told.reason is reason
    assert f"its words ({code}); it is asked again after 2027-01-15T08:05:00Z" in str(told)


def test_what_was_shown_is_still_to_be_removed() -> None:
    """A refused order stays for as long as its proofs do."""
    order = record(proofs=(PROOF,), url="https://ca/1")
    left = after_problem(State((order,)), order, CaProblem("unauthorized", "no", 403), NOW).order(order.id)
    assert left is not None
    assert left.given_up
    assert not left.is_open
    assert left.proofs == (PROOF,)


@pytest.mark.parametrize("problem", [CaProblem("", "gone", 404), CaProblem("accountDoesNotExist", "who?", 400)])
def test_an_order_that_the_ca_has_forgotten_begins_anew(problem: CaProblem) -> None:
    """Nothing stands against its names."""
    order = record(url="https://ca/1")
    state = after_problem(State((order,)), order, problem, NOW)
    anew = state.order(order.id)
    assert anew is not None
    assert anew.url == ""
    assert state.blocks == ()


def test_trouble_is_told_and_tried_again() -> None:
    """With pauses that double from five seconds to five minutes."""
    state, pauses = State((record(),)), []
    for _ in range(9):
        order = state.order(record().id)
        assert order is not None
        state = after_trouble(state, order, "DNS server 192.0.2.1: does not answer in time", NOW)
        waiting = state.order(order.id)
        assert waiting is not None
        pauses.append(waiting.retry_at - NOW)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    told = pending(state.orders[0])
    assert told.reason is Reason.ISSUANCE_PENDING
    assert "DNS server 192.0.2.1: does not answer in time; goes on after 2027-01-15T08:05:00Z" in str(told)
