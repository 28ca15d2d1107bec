"""The index of rules by namespace, and the globs."""

from __future__ import annotations

import re

from hypothesis import event, example, given
from hypothesis import strategies as st

from csi_driver.core.identity import ServiceAccount
from csi_driver.core.policy.patterns import glob_matches
from csi_driver.core.policy.rule_index import RuleIndex
from csi_driver.core.policy.rules import DenyListEntry, RuleMatch

texts = st.text("ab-.*\n", max_size=8)
globs = st.text("ab-.*", max_size=8)


@given(globs.filter(lambda glob: "*" in glob), texts)
@example("*", "\n")
@example("**", "a")
@example("a*a", "a")
@example("a*a", "aa")
@example("*a*a*", "baab")
@example("*ab*ab", "xabab")
def test_star_stands_for_one_or_more_characters(glob: str, text: str) -> None:
    plain = re.fullmatch(".+".join(map(re.escape, glob.split("*"))), text) is not None
    event(f"matches: {plain}")
    assert glob_matches(glob, text) == plain


@given(st.lists(st.lists(globs, min_size=1, max_size=3).map(tuple), max_size=8), texts)
@example([("a",), ("*",), ("a*", "a"), ("b",)], "a")
@example([("ab*",), ("a*b",), ("*b",)], "ab")
def test_index_finds_every_rule_that_matches_in_the_order_of_the_file(
    namespaces: list[tuple[str, ...]], namespace: str
) -> None:
    rules = [DenyListEntry(RuleMatch(each, ("*",)), "", str(number)) for number, each in enumerate(namespaces)]
    found = list(RuleIndex(rules).candidates(namespace))
    account = ServiceAccount(namespace, "web")
    matching = [rule for rule in rules if rule.match.matches(account, {})]
    event(f"{len(matching)} match, {len(found)} found")
    assert [rule for rule in found if rule.match.matches(account, {})] == matching
    assert [int(rule.label) for rule in found] == sorted({int(rule.label) for rule in found})


def test_rules_of_other_namespaces_are_not_read() -> None:
    namespaces = [*((f"team-{number}", f"team-{number}-*") for number in range(1000)), ("*-prod",)]
    index = RuleIndex([DenyListEntry(RuleMatch(each, ("*",)), "") for each in namespaces])
    assert [rule.match.namespaces[0] for rule in index.candidates("team-7")] == ["team-7", "*-prod"]
    assert [rule.match.namespaces[0] for rule in index.candidates("team-7-dev")] == ["team-7", "*-prod"]
