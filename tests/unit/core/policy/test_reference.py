"""A second policy, written apart, must come to the same verdict about everything."""

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
    asked,
    decide,
    is_name,
    near_names,
    policy,
    requests,
    subject,
    text_patterns,
)
from tests.unit.core.policy.reference import Entry, Granted, Pod, Wish, glob_fits, judge, kind_of, name_fits, range_fits

HOSTILE_VALUES = ["*", "a*", "*.*", "{pod}", "{namespace}", "a.b.example", "", "a/b", "..", "A", "ü", "a\n", ".*", "[a]", "a@b"]  # fmt: skip


@settings(max_examples=10 * settings().max_examples)
@given(requests())
def test_policy_and_reference_agree(request: tuple[list[Entry], Pod, Wish]) -> None:
    """Nothing that the reference refuses is ever granted, nothing that it grants is refused, and no more and no less is granted."""
    rules, pod, wish = request
    expected = judge(rules, wish, pod, DOMAINS)
    result = outcome(lambda: policy(*rules).decide(subject(pod), asked(wish)), CertmountError)
    if isinstance(result, Grant):
        event("granted with names" if wish.names else "granted without names")
        assert isinstance(expected, Granted)
        assert frozenset(str(name) for name in result.names) == expected.names
        assert tuple(usage.value for usage in result.usages) == tuple(
            u for u in ("server", "client") if u in expected.usages
        )
        assert result.duration == timedelta(seconds=expected.seconds)
        assert set(names(*wish.names)) <= set(result.names)
        return
    assert not isinstance(expected, Granted)
    event("refused together" if not expected.names else "refused by name")
    assert result.reason is Reason.NAME_NOT_ALLOWED
    faulty = {fault.field for fault in result.faults if isinstance(fault, Fault)}
    own = f"spiffe://td.example/ns/{pod.namespace}/sa/{pod.account}"
    assert faulty == (expected.names or set(wish.names) - {own})
    assert str(result).isprintable()


@given(requests(), requests())
def test_rules_add_up(one: tuple[list[Entry], Pod, Wish], other: tuple[list[Entry], Pod, Wish]) -> None:
    """More rules never refuse what fewer allow."""
    rules, pod, wish = one
    granted = outcome(lambda: policy(*rules).decide(subject(pod), asked(wish)), CertmountError)
    assume(isinstance(granted, Grant))
    assert isinstance(granted, Grant)
    wider = policy(*other[0], *rules).decide(subject(pod), asked(wish))
    assert set(granted.names) <= set(wider.names)
    assert len(granted.usages) <= len(wider.usages)


@given(requests())
def test_the_order_of_rules_does_not_matter(request: tuple[list[Entry], Pod, Wish]) -> None:
    """Turned around, a policy grants the same."""
    rules, pod, wish = request
    there = outcome(lambda: policy(*rules).decide(subject(pod), asked(wish)), CertmountError)
    back = outcome(lambda: policy(*rules[::-1]).decide(subject(pod), asked(wish)), CertmountError)
    if isinstance(there, Grant):
        assert isinstance(back, Grant)
        assert (there.names, there.usages, there.duration) == (back.names, back.usages, back.duration)
    else:
        assert isinstance(back, CertmountError)


@given(requests())
def test_a_denied_service_account_gets_nothing(request: tuple[list[Entry], Pod, Wish]) -> None:
    """Whatever rules there are, and whatever it asks for."""
    rules, pod, wish = request
    denying = policy(*rules, deny=((pod.namespace, "*"),))
    result = outcome(lambda: denying.decide(subject(pod), asked(wish)), CertmountError)
    assert isinstance(result, CertmountError)
    assert result.reason is Reason.SERVICE_ACCOUNT_DENIED


@given(
    requests(),
    st.lists(st.tuples(st.sampled_from(["a*", "*b", "b-a"]), st.sampled_from(["a", "*b", "*-a"])), max_size=2),
)
def test_a_deny_list_takes_away_from_whom_it_names(
    request: tuple[list[Entry], Pod, Wish], deny: list[tuple[str, str]]
) -> None:
    """Whom no entry names is decided on as if there were no list."""
    rules, pod, wish = request
    without = outcome(lambda: policy(*rules).decide(subject(pod), asked(wish)), CertmountError)
    result = outcome(lambda: policy(*rules, deny=tuple(deny)).decide(subject(pod), asked(wish)), CertmountError)
    if any(glob_fits(namespace, pod.namespace) and glob_fits(account, pod.account) for namespace, account in deny):
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
def test_pattern_and_reference_agree_on_any_values(near: tuple[str, str], values: dict[str, str]) -> None:
    """Dots, stars, braces, slashes and worse in a pod's, account's or Service's name change nothing about what a pattern means."""
    pattern, name = near
    assume(is_name(name) and kind_of(name) == kind_of(pattern))
    made = makers[kind_of(pattern)](pattern, DOMAINS)
    text = str(next(iter(names(name))))
    assert made.matches(text, values, (values["service"],)) == name_fits(pattern, text, DOMAINS, values)


@given(
    st.one_of(st.sampled_from(RANGES), st.ip_addresses().map(str)),
    st.one_of(st.sampled_from(ADDRESSES), st.ip_addresses().map(str)),
    st.integers(0, 128),
)
def test_ranges_agree_with_the_reference(network: str, address: str, length: int) -> None:
    """An address is in a range by its first bits, and never in one of the other version."""
    text = network if "/" in network else f"{network}/{length}"
    known = outcome(lambda: IPRange.parse(text), ValueError)
    assume(isinstance(known, IPRange) and is_name(address))
    assert isinstance(known, IPRange)
    assert known.matches(names(address).ips[0]) == range_fits(text, address)


@given(st.text(alphabet="ab*", min_size=1, max_size=8), st.text(alphabet="ab", min_size=1, max_size=12))
def test_globs_of_accounts_agree_with_the_reference(glob: str, text: str) -> None:
    """A star in a match stands for one or more characters."""
    rules = policy(Entry((glob,), names=("x.example",)))
    result = decide(rules, "x.example", pod=Pod(text, "edge", "edge-0"))
    assert isinstance(result, Grant) == glob_fits(glob, text)


@pytest.mark.parametrize("account", ACCOUNTS)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_key_type_is_granted_by_default(namespace: str, account: str) -> None:
    """A rule that says nothing of key types allows all that there are."""
    for key_type in KeyType:
        wish = Wish(("x.example",), key_type.value)
        rules = policy(Entry(names=("x.example",)))
        grant = functools.partial(rules.decide, subject(Pod(namespace, account, "p")), asked(wish))
        assert isinstance(outcome(grant, CertmountError), Grant)
