"""Comparison of the policy with a second implementation."""

from __future__ import annotations

import functools
from datetime import timedelta

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.policy.engine import Grant
from csi_driver.core.policy.pattern_index import RangeIndex
from csi_driver.core.policy.patterns import IPRange, NamePattern
from csi_driver.core.spec import KeyType
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import names
from tests.unit.core.policy import policies, reference
from tests.unit.core.policy.policies import (
    DOMAINS,
    decide,
    is_name,
    near_names,
    policy,
    requested,
    requests,
    requests_for_secrets,
    requests_with_subjects,
    subject,
)
from tests.unit.core.policy.reference import Entry, Pod, Request, kind_of

Case = tuple[list[Entry], Pod, Request]
HOSTILE_VALUES = ["*", "a*", "*.*", "{pod}", "{namespace}", "a.b.example", "", "a/b", "..", "A", "ü", "a\n", ".*", "[a]", "a@b"]  # fmt: skip


@settings(max_examples=10 * settings().max_examples)
@given(st.one_of(requests(), requests_with_subjects(), requests_for_secrets()))
def test_policy_agrees_with_reference(request: Case) -> None:
    rules, pod, req = request
    expected = reference.evaluate(rules, req, pod, DOMAINS)
    result = outcome(lambda: policy(*rules).decide(subject(pod), requested(req)), CertmountError)
    if isinstance(result, Grant):
        event("allowed with names" if req.names else "allowed without names")
        event("allowed with a subject" if req.subject else "allowed without a subject")
        assert isinstance(expected, reference.Allowed)
        assert frozenset(str(name) for name in result.names) == expected.names
        assert tuple(u.value for u in result.usages) == tuple(u for u in ("server", "client") if u in expected.usages)
        assert result.duration == timedelta(seconds=expected.seconds)
        assert set(names(*req.names)) <= set(result.names)
        return
    assert not isinstance(expected, reference.Allowed)
    assert str(result).isprintable()
    event(type(expected).__name__)
    if isinstance(expected, reference.NotValid):
        assert result.reason is Reason.INVALID_ATTRIBUTES
        return
    assert result.reason is Reason.NAME_NOT_ALLOWED
    decision = policy(*rules).evaluate(subject(pod), requested(req))
    own = reference.own_id(pod, DOMAINS)
    faulty = {str(name.name) for name in decision.names if not name.rule}
    assert (faulty - {own} or faulty) == (expected.names or set(req.names) - {own})
    for text in faulty - {own}:
        assert text in str(result)


@given(requests(), requests())
def test_more_rules_never_allow_less(one: Case, other: Case) -> None:
    rules, pod, req = one
    granted = outcome(lambda: policy(*rules).decide(subject(pod), requested(req)), CertmountError)
    assume(isinstance(granted, Grant))
    assert isinstance(granted, Grant)
    wider = policy(*other[0], *rules).decide(subject(pod), requested(req))
    assert set(granted.names) <= set(wider.names)
    assert len(granted.usages) <= len(wider.usages)


@given(requests() | requests_for_secrets())
def test_order_of_rules_does_not_matter(request: Case) -> None:
    rules, pod, req = request
    there = outcome(lambda: policy(*rules).decide(subject(pod), requested(req)), CertmountError)
    back = outcome(lambda: policy(*rules[::-1]).decide(subject(pod), requested(req)), CertmountError)
    if isinstance(there, Grant):
        assert isinstance(back, Grant)
        assert (there.names, there.usages, there.duration) == (back.names, back.usages, back.duration)
    else:
        assert isinstance(back, CertmountError)


@given(requests())
def test_denied_service_account_is_not_allowed_anything(request: Case) -> None:
    rules, pod, req = request
    denying = policy(*rules, deny=((pod.namespace, "*"),))
    result = outcome(lambda: denying.decide(subject(pod), requested(req)), CertmountError)
    assert isinstance(result, CertmountError)
    assert result.reason is Reason.SERVICE_ACCOUNT_DENIED


@given(
    requests(),
    st.lists(st.tuples(st.sampled_from(["a*", "*b", "b-a"]), st.sampled_from(["a", "*b", "*-a"])), max_size=2),
)
def test_deny_list_affects_only_matching_accounts(request: Case, deny: list[tuple[str, str]]) -> None:
    rules, pod, req = request
    without = outcome(lambda: policy(*rules).decide(subject(pod), requested(req)), CertmountError)
    result = outcome(lambda: policy(*rules, deny=tuple(deny)).decide(subject(pod), requested(req)), CertmountError)
    if any(
        reference.glob_matches(namespace, pod.namespace) and reference.glob_matches(account, pod.account)
        for namespace, account in deny
    ):
        assert isinstance(result, CertmountError)
        assert result.reason is Reason.SERVICE_ACCOUNT_DENIED
    else:
        assert str(result) == str(without)


any_values = st.fixed_dictionaries(
    {
        key: st.sampled_from([*policies.PODS, *HOSTILE_VALUES])
        for key in ("namespace", "service_account", "pod", "service")
    }
)
makers = {"dns": NamePattern.for_dns, "uris": NamePattern.for_uri, "emails": NamePattern.for_email}


@given(
    policies.text_patterns.flatmap(lambda text: st.tuples(st.just(text), near_names(st.just(text), any_values))),
    any_values,
)
def test_pattern_agrees_with_reference_for_any_values(near: tuple[str, str], values: dict[str, str]) -> None:
    pattern, name = near
    assume(is_name(name) and kind_of(name) == kind_of(pattern))
    made = makers[kind_of(pattern)](pattern, DOMAINS)
    text = str(next(iter(names(name))))
    assert made.matches(text, values, (values["service"],)) == reference.name_matches(pattern, text, DOMAINS, values)


@given(
    st.one_of(st.sampled_from(policies.RANGES), st.ip_addresses().map(str)),
    st.one_of(st.sampled_from(policies.ADDRESSES), st.ip_addresses().map(str)),
    st.integers(0, 128),
)
def test_ip_range_agrees_with_reference(network: str, address: str, length: int) -> None:
    text = network if "/" in network else f"{network}/{length}"
    known = outcome(lambda: IPRange.parse(text), ValueError)
    assume(isinstance(known, IPRange) and is_name(address))
    assert isinstance(known, IPRange)
    assert RangeIndex((known,)).matches(names(address).ips[0]) == reference.range_matches(text, address)


@given(st.text(alphabet="ab*", min_size=1, max_size=8), st.text(alphabet="ab", min_size=1, max_size=12))
def test_globs_agree_with_the_reference(glob: str, text: str) -> None:
    rules = policy(Entry((glob,), names=("x.example",)))
    result = decide(rules, "x.example", pod=Pod(text, "edge", "edge-0"))
    assert isinstance(result, Grant) == reference.glob_matches(glob, text)


@pytest.mark.parametrize("account", policies.ACCOUNTS)
@pytest.mark.parametrize("namespace", policies.NAMESPACES)
def test_all_key_types_are_allowed_by_default(namespace: str, account: str) -> None:
    for key_type in KeyType:
        req = Request(("x.example",), key_type.value)
        rules = policy(Entry(names=("x.example",)))
        grant = functools.partial(rules.decide, subject(Pod(namespace, account, "p")), requested(req))
        assert isinstance(outcome(grant, CertmountError), Grant)
