"""Comparison of the policy with a second implementation."""

from __future__ import annotations

import functools
from datetime import timedelta

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.policy.engine import Grant
from csi_driver.core.policy.patterns import IPRange, NamePattern
from csi_driver.core.spec import KeyType
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import names
from tests.unit.core.policy.policies import (
    ACCOUNTS,
    ADDRESSES,
    DOMAINS,
    NAMESPACES,
    PODS,
    RANGES,
    decide,
    is_name,
    near_names,
    policy,
    requested,
    requests,
    subject,
    text_patterns,
)
from tests.unit.core.policy.reference import (
    Allowed,
    Entry,
    Pod,
    Request,
    evaluate,
    glob_matches,
    kind_of,
    name_matches,
    range_matches,
)

HOSTILE_VALUES = ["*", "a*", "*.*", "{pod}", "{namespace}", "a.b.example", "", "a/b", "..", "A", "ü", "a\n", ".*", "[a]", "a@b"]  # fmt: skip


@settings(max_examples=10 * settings().max_examples)
@given(requests())
def test_policy_agrees_with_reference(request: tuple[list[Entry], Pod, Request]) -> None:
    rules, pod, req = request
    expected = evaluate(rules, req, pod, DOMAINS)
    result = outcome(lambda: policy(*rules).decide(subject(pod), requested(req)), CertmountError)
    if isinstance(result, Grant):
        event("allowed with names" if req.names else "allowed without names")
        assert isinstance(expected, Allowed)
        assert frozenset(str(name) for name in result.names) == expected.names
        assert tuple(usage.value for usage in result.usages) == tuple(
            u for u in ("server", "client") if u in expected.usages
        )
        assert result.duration == timedelta(seconds=expected.seconds)
        assert set(names(*req.names)) <= set(result.names)
        return
    assert not isinstance(expected, Allowed)
    event("incompatible" if not expected.names else "not allowed")
    assert result.reason is Reason.NAME_NOT_ALLOWED
    faulty = {fault.field for fault in result.faults if isinstance(fault, Fault)}
    own = f"spiffe://td.example/ns/{pod.namespace}/sa/{pod.account}"
    assert faulty == (expected.names or set(req.names) - {own})
    assert str(result).isprintable()


@given(requests(), requests())
def test_more_rules_never_allow_less(
    one: tuple[list[Entry], Pod, Request], other: tuple[list[Entry], Pod, Request]
) -> None:
    rules, pod, req = one
    granted = outcome(lambda: policy(*rules).decide(subject(pod), requested(req)), CertmountError)
    assume(isinstance(granted, Grant))
    assert isinstance(granted, Grant)
    wider = policy(*other[0], *rules).decide(subject(pod), requested(req))
    assert set(granted.names) <= set(wider.names)
    assert len(granted.usages) <= len(wider.usages)


@given(requests())
def test_order_of_rules_does_not_matter(request: tuple[list[Entry], Pod, Request]) -> None:
    rules, pod, req = request
    there = outcome(lambda: policy(*rules).decide(subject(pod), requested(req)), CertmountError)
    back = outcome(lambda: policy(*rules[::-1]).decide(subject(pod), requested(req)), CertmountError)
    if isinstance(there, Grant):
        assert isinstance(back, Grant)
        assert (there.names, there.usages, there.duration) == (back.names, back.usages, back.duration)
    else:
        assert isinstance(back, CertmountError)


@given(requests())
def test_denied_service_account_is_not_allowed_anything(request: tuple[list[Entry], Pod, Request]) -> None:
    rules, pod, req = request
    denying = policy(*rules, deny=((pod.namespace, "*"),))
    result = outcome(lambda: denying.decide(subject(pod), requested(req)), CertmountError)
    assert isinstance(result, CertmountError)
    assert result.reason is Reason.SERVICE_ACCOUNT_DENIED


@given(
    requests(),
    st.lists(st.tuples(st.sampled_from(["a*", "*b", "b-a"]), st.sampled_from(["a", "*b", "*-a"])), max_size=2),
)
def test_deny_list_affects_only_matching_accounts(
    request: tuple[list[Entry], Pod, Request], deny: list[tuple[str, str]]
) -> None:
    rules, pod, req = request
    without = outcome(lambda: policy(*rules).decide(subject(pod), requested(req)), CertmountError)
    result = outcome(lambda: policy(*rules, deny=tuple(deny)).decide(subject(pod), requested(req)), CertmountError)
    if any(
        glob_matches(namespace, pod.namespace) and glob_matches(account, pod.account) for namespace, account in deny
    ):
        assert isinstance(result, CertmountError)
        assert result.reason is Reason.SERVICE_ACCOUNT_DENIED
    else:
        assert str(result) == str(without)


any_values = st.fixed_dictionaries(
    {key: st.sampled_from([*PODS, *HOSTILE_VALUES]) for key in ("namespace", "service_account", "pod", "service")}
)
makers = {"dns": NamePattern.for_dns, "uris": NamePattern.for_uri, "emails": NamePattern.for_email}


@given(
    text_patterns.flatmap(lambda pattern: st.tuples(st.just(pattern), near_names(st.just(pattern), any_values))),
    any_values,
)
def test_pattern_agrees_with_reference_for_any_values(near: tuple[str, str], values: dict[str, str]) -> None:
    """Special characters in the name of a pod, service account or Service do not change the meaning of a pattern."""
    pattern, name = near
    assume(is_name(name) and kind_of(name) == kind_of(pattern))
    made = makers[kind_of(pattern)](pattern, DOMAINS)
    text = str(next(iter(names(name))))
    assert made.matches(text, values, (values["service"],)) == name_matches(pattern, text, DOMAINS, values)


@given(
    st.one_of(st.sampled_from(RANGES), st.ip_addresses().map(str)),
    st.one_of(st.sampled_from(ADDRESSES), st.ip_addresses().map(str)),
    st.integers(0, 128),
)
def test_ip_range_agrees_with_reference(network: str, address: str, length: int) -> None:
    text = network if "/" in network else f"{network}/{length}"
    known = outcome(lambda: IPRange.parse(text), ValueError)
    assume(isinstance(known, IPRange) and is_name(address))
    assert isinstance(known, IPRange)
    assert known.matches(names(address).ips[0]) == range_matches(text, address)


@given(st.text(alphabet="ab*", min_size=1, max_size=8), st.text(alphabet="ab", min_size=1, max_size=12))
def test_globs_agree_with_the_reference(glob: str, text: str) -> None:
    rules = policy(Entry((glob,), names=("x.example",)))
    result = decide(rules, "x.example", pod=Pod(text, "edge", "edge-0"))
    assert isinstance(result, Grant) == glob_matches(glob, text)


@pytest.mark.parametrize("account", ACCOUNTS)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_all_key_types_are_allowed_by_default(namespace: str, account: str) -> None:
    for key_type in KeyType:
        req = Request(("x.example",), key_type.value)
        rules = policy(Entry(names=("x.example",)))
        grant = functools.partial(rules.decide, subject(Pod(namespace, account, "p")), requested(req))
        assert isinstance(outcome(grant, CertmountError), Grant)
