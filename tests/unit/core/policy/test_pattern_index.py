"""The index of name patterns agrees with a comparison of all patterns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError
from csi_driver.core.names import IPAddress
from csi_driver.core.policy.engine import Grant
from csi_driver.core.policy.pattern_index import PatternIndex, RangeIndex
from csi_driver.core.policy.patterns import IPRange, NamePattern
from tests.unit.core.outcomes import outcome
from tests.unit.core.policy import policies
from tests.unit.core.policy.policies import (
    DOMAINS,
    near_names,
    policy,
    requested,
    requests,
    requests_for_secrets,
    requests_with_subjects,
    subject,
)
from tests.unit.core.policy.test_reference import Case, any_values

FORMS: list[tuple[Callable[[str, Mapping[str, str]], NamePattern], st.SearchStrategy[str]]] = [
    (NamePattern.for_dns, policies.dns_patterns),
    (NamePattern.for_uri, policies.uri_patterns),
    (NamePattern.for_email, policies.email_patterns),
    (NamePattern.for_subject, policies.subject_patterns),
]


def _matches_plainly(self: PatternIndex, name: str, values: Mapping[str, str], services: Sequence[str] = ()) -> bool:
    return any(pattern.matches(name, values, services) for pattern in self.patterns)


@given(
    st.sampled_from(FORMS).flatmap(
        lambda form: st.tuples(
            st.just(form[0]),
            st.lists(form[1], max_size=8),
            near_names(form[1], any_values) | st.text("ab.*", max_size=3),
        )
    ),
    any_values,
    st.lists(st.sampled_from(policies.SERVICES), max_size=3),
)
def test_index_agrees_with_a_comparison_of_all_patterns(
    case: tuple[Callable[[str, Mapping[str, str]], NamePattern], list[str], str],
    values: dict[str, str],
    services: list[str],
) -> None:
    parse, texts, name = case
    index = PatternIndex(tuple(parse(text, DOMAINS) for text in texts))
    plain = _matches_plainly(index, name, values, services)
    event(f"matches: {plain}")
    assert index.matches(name, values, services) == plain


@given(st.one_of(requests(), requests_with_subjects(), requests_for_secrets()))
def test_decisions_and_faults_agree_with_a_comparison_of_all_patterns(case: Case) -> None:
    rules, pod, req = case
    made = policy(*rules)

    def decide() -> tuple[object, Grant | str]:
        result = outcome(lambda: made.decide(subject(pod), requested(req)), CertmountError)
        return made.evaluate(subject(pod), requested(req)), result if isinstance(result, Grant) else str(result)

    indexed = decide()
    with mock.patch.object(PatternIndex, "matches", _matches_plainly):
        assert decide() == indexed


def test_name_is_compared_only_with_patterns_whose_literal_ends_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = range(1000)
    texts = [
        *(f"*.team-{number}.example.com" for number in numbers),
        *(f"team-{number}-{{pod}}.example.com" for number in numbers),
        *(f"db-{number}.{{namespace}}" for number in numbers),
    ]
    index = PatternIndex(tuple(NamePattern.for_dns(text, DOMAINS) for text in (*texts, "{pod}.*", "*.example.com")))
    compared: list[str] = []
    monkeypatch.setattr(NamePattern, "matches", lambda self, *_args: compared.append(self.text))
    assert not index.matches("team-8-www.team-7.example.com", {})
    expected = ["{pod}.*", "*.example.com", "*.team-7.example.com", "team-8-{pod}.example.com"]
    assert compared == expected


@given(st.lists(st.sampled_from(policies.RANGES), max_size=8), st.sampled_from(policies.ADDRESSES))
def test_index_agrees_with_a_comparison_of_all_ranges(texts: list[str], text: str) -> None:
    ranges = tuple(
        made
        for made in (outcome(functools.partial(IPRange.parse, one), ValueError) for one in texts)
        if isinstance(made, IPRange)
    )
    address = outcome(lambda: IPAddress.parse(text), ValueError)
    assume(isinstance(address, IPAddress))
    assert isinstance(address, IPAddress)
    assert RangeIndex(ranges).matches(address) == any(address.address in one.network for one in ranges)
