"""Who may have which name. A second matcher, written apart, must come to the same verdict about everything."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping
from datetime import timedelta

import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import URI, NameProblem, Names
from csi_driver.core.patterns import NamePattern, PatternProblem
from csi_driver.core.policy import DEFAULT_DURATION, Grant, Policy
from csi_driver.core.policy_document import parse_policy
from csi_driver.core.spec import LEAST_DURATION
from tests.unit.core import strategies
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import names
from tests.unit.core.reference import Entry, glob_fits, judge, name_fits

DOMAINS = {"trust_domain": "td.example", "cluster_domain": "cluster.local"}
# Few letters, so that patterns and names meet often.
NAMESPACES = ["a", "ab", "b-a"]
ACCOUNTS = ["a", "b", "a.b", "ab-a"]
PODS = ["a", "b", "ab", "b-0", "a.b"]
HOSTILE_VALUES = [
    "*",
    "a*",
    "*.*",
    "{pod}",
    "{namespace}",
    "a.b.example",
    "",
    "a/b",
    "..",
    "A",
    "ü",
    "a\n",
    ".*",
    "[a]",
]


def identity(namespace: str = "web", account: str = "edge", pod: str = "edge-0") -> PodIdentity:
    return PodIdentity(ServiceAccount(namespace, account), "sa-uid", pod, "pod-uid", "node-1", "node-uid", 2e9)


identities = st.builds(
    identity,
    st.sampled_from(NAMESPACES),
    st.sampled_from(ACCOUNTS),
    st.sampled_from(PODS),
)


def values_of(pod: PodIdentity) -> dict[str, str]:
    account = pod.service_account
    return {"namespace": account.namespace, "service_account": account.name, "pod": pod.pod_name}


def policy(*entries: Entry) -> Policy:
    document = {"policy": [entry.document() for entry in entries]}
    return parse_policy(document, trust_domain=DOMAINS["trust_domain"], cluster_domain=DOMAINS["cluster_domain"])


def everyone(*patterns: str, hours: int | None = None) -> Entry:
    """A rule for all pods."""
    dns = tuple(pattern for pattern in patterns if "://" not in pattern)
    return Entry(("*",), ("*",), dns, tuple(pattern for pattern in patterns if "://" in pattern), hours)


part_pieces = st.sampled_from(["a", "b", "a-b", "-", "*", "*", "{namespace}", "{service_account}", "{pod}"])
pattern_parts = st.lists(part_pieces, min_size=1, max_size=3).map(lambda pieces: re.sub(r"\*+", "*", "".join(pieces)))
dns_patterns = st.builds(
    lambda parts, end: ".".join(parts) + end,
    st.lists(pattern_parts, min_size=1, max_size=3),
    st.sampled_from(["", ".example", ".{cluster_domain}"]),
)
uri_patterns = st.builds(
    lambda host, path: "/".join([f"spiffe://{host}", *path]),
    st.sampled_from(["{trust_domain}", "a.b"]),
    st.lists(pattern_parts, min_size=1, max_size=3),
)
patterns = st.one_of(dns_patterns, uri_patterns)


def filled(pattern: str, values: Mapping[str, str], fillings: list[str]) -> str:
    """A name that a pattern allows, or nearly so: values for placeholders, and a filling for each star in turn."""
    for placeholder, value in {**DOMAINS, **values}.items():
        pattern = pattern.replace("{" + placeholder + "}", value)
    literals = pattern.split("*")
    return literals[0] + "".join(
        fillings[index % len(fillings)] + literal for index, literal in enumerate(literals[1:])
    )


def near_names(pattern: st.SearchStrategy[str], values: st.SearchStrategy[dict[str, str]]) -> st.SearchStrategy[str]:
    """Names near to patterns, most of them with the values that the pod really has."""
    fillings = st.sampled_from(["a", "b", "ab", "a-b"] * 2 + ["*", "", "a.b", "/"])
    return st.builds(filled, pattern, values, st.lists(fillings, min_size=1, max_size=4))


def is_name(text: str) -> bool:
    return isinstance(outcome(lambda: names(text), NameProblem), Names)


rules = st.builds(
    Entry,
    st.sampled_from([("*",)] * 4 + [("a", "*b"), ("a*", "b-*")]),
    st.sampled_from([("*",)] * 4 + [("a", "*.b"), ("ab-*", "b")]),
    st.lists(dns_patterns, min_size=1, max_size=3).map(tuple),
    st.lists(uri_patterns, max_size=2).map(tuple),
    st.sampled_from([None, 1, 12, 48]),
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[Entry], PodIdentity, Names]:
    """A policy, a pod, and names that it asks for, near to what the policy allows."""
    entries = draw(st.lists(rules, min_size=draw(st.sampled_from([0, 1, 1, 1])), max_size=3))
    pod = draw(identities)
    allowed = [pattern for entry in entries for pattern in (*entry.dns, *entry.uris)]
    sources = st.one_of(patterns, *[st.sampled_from(allowed)] * (4 if allowed else 0))
    values = st.sampled_from([values_of(pod)] * 5 + [dict.fromkeys(values_of(pod), "a")])
    texts = draw(st.lists(near_names(sources, values), min_size=1, max_size=2))
    return entries, pod, names(*filter(is_name, texts))


@settings(max_examples=3 * settings().max_examples)
@given(requests(), st.sampled_from([None, None, None, 1, 2, 24, 25, 48, 72]))
def test_policy_and_reference_agree(request: tuple[list[Entry], PodIdentity, Names], hours: int | None) -> None:
    """No name and no life that the reference refuses is ever granted, and none that it allows is ever refused."""
    entries, pod, asked = request
    duration = None if hours is None else timedelta(hours=hours)
    account = pod.service_account
    own = f"spiffe://{DOMAINS['trust_domain']}/ns/{account.namespace}/sa/{account.name}"
    asked_texts = [str(name) for name in (*asked.dns, *asked.uris)]
    verdict = judge(entries, asked_texts, own, DOMAINS, values_of(pod))
    grant = outcome(lambda: policy(*entries).decide(pod, asked, duration), CertmountError)
    if isinstance(grant, Grant):
        event("granted with names" if asked else "granted without names")
        assert not verdict.refused
        assert grant.names == Names.of(asked.dns, (URI.parse(own), *asked.uris))
        assert grant.duration <= verdict.longest
        assert grant.duration == (duration or min(DEFAULT_DURATION, verdict.longest))
    else:
        event("refused")
        assert grant.reason is Reason.NAME_REFUSED
        faulty = {fault.field for fault in grant.faults if isinstance(fault, Fault)}
        assert faulty - {"duration"} == verdict.refused
        assert ("duration" in faulty) == (duration is not None and duration > verdict.longest)


any_values = st.fixed_dictionaries({key: st.sampled_from([*PODS, *HOSTILE_VALUES]) for key in values_of(identity())})


@given(
    patterns.flatmap(lambda pattern: st.tuples(st.just(pattern), near_names(st.just(pattern), any_values))), any_values
)
def test_pattern_and_reference_agree_on_any_values(near: tuple[str, str], values: dict[str, str]) -> None:
    """Dots, stars, braces, slashes and worse in a pod's or account's name change nothing about what a pattern means."""
    pattern, name = near
    assume(is_name(name))
    make = NamePattern.for_uri if "://" in pattern else NamePattern.for_dns
    assert make(pattern, DOMAINS).matches(name, values) == name_fits(pattern, name, DOMAINS, values)


@given(st.sampled_from(HOSTILE_VALUES), st.sampled_from(["pod", "service_account", "namespace"]), strategies.dns_texts)
@example("a.b.example", "pod", "a.b.example")
def test_a_hostile_value_matches_nothing(value: str, placeholder: str, name: str) -> None:
    """A value that is no single label, put alone into a DNS pattern's label, allows no name whatever."""
    pattern = NamePattern.for_dns(f"{{{placeholder}}}.svc.example", DOMAINS)
    values = {**values_of(identity()), placeholder: value}
    for text in (name, f"{value}.svc.example", "x.svc.example", "*.svc.example", "a.svc.example"):
        assert not pattern.matches(text, values)


@given(
    dns_patterns,
    identities,
    st.lists(st.sampled_from(["a", "b", "ab", "example"]), min_size=2, max_size=4),
    strategies.labels,
)
def test_a_wildcard_is_granted_only_where_all_it_covers_is(
    pattern: str, pod: PodIdentity, labels: list[str], label: str
) -> None:
    """A certificate for ``*.x`` serves every name one label below ``x``; so each of these is allowed by itself."""
    made = NamePattern.for_dns(pattern, DOMAINS)
    wildcard = ".".join(["*", *labels])
    assert not made.matches(wildcard, values_of(pod)) or made.matches(".".join([label, *labels]), values_of(pod))


@pytest.mark.parametrize(
    "pattern, granted",
    [
        ("*.example.com", True),
        ("*.*.com", True),
        ("a*.example.com", False),
        ("*-a.example.com", False),
        ("{pod}.example.com", False),
        ("www.example.com", False),
        ("*.com", False),
        ("*.*.example.com", False),
    ],
)
def test_a_wildcard_name_needs_a_bare_star(pattern: str, granted: bool) -> None:
    """``*.example.com`` is granted by a pattern whose first label is ``*`` and nothing else."""
    result = outcome(lambda: policy(everyone(pattern)).decide(identity(), names("*.example.com"), None), CertmountError)
    assert isinstance(result, Grant) == granted


@given(requests(), requests())
def test_rules_add_up(
    one: tuple[list[Entry], PodIdentity, Names], other: tuple[list[Entry], PodIdentity, Names]
) -> None:
    """More rules never refuse a name that fewer allow, and never shorten its life."""
    entries, pod, asked = one
    grant = outcome(lambda: policy(*entries).decide(pod, asked, None), CertmountError)
    assume(isinstance(grant, Grant))
    assert isinstance(grant, Grant)
    wider = policy(*other[0], *entries).decide(pod, asked, None)
    assert wider.names == grant.names
    assert wider.duration >= grant.duration


@given(requests())
def test_the_order_of_rules_does_not_matter(request: tuple[list[Entry], PodIdentity, Names]) -> None:
    """Turned around, a policy says the same."""
    entries, pod, asked = request
    there = outcome(lambda: policy(*entries).decide(pod, asked, None), CertmountError)
    back = outcome(lambda: policy(*entries[::-1]).decide(pod, asked, None), CertmountError)
    assert str(there) == str(back)


@given(requests())
def test_the_own_spiffe_id_is_always_granted(request: tuple[list[Entry], PodIdentity, Names]) -> None:
    """Under any policy, asked for or not, a pod gets its service account's SPIFFE ID, for a day."""
    entries, pod, _ = request
    account = pod.service_account
    own = URI.parse(f"spiffe://td.example/ns/{account.namespace}/sa/{account.name}")
    for asked in (Names(), Names.of(uris=[own])):
        grant = policy(*entries).decide(pod, asked, None)
        assert grant == Grant(Names.of(uris=[own]), DEFAULT_DURATION)


@given(identities, identities)
def test_the_spiffe_id_of_another_account_is_refused_by_default(pod: PodIdentity, other: PodIdentity) -> None:
    """Without rules no pod gets the identity of another service account."""
    account = other.service_account
    assume(account != pod.service_account)
    asked = names(f"spiffe://td.example/ns/{account.namespace}/sa/{account.name}")
    with pytest.raises(CertmountError, match="no policy rule allows this name"):
        policy().decide(pod, asked, None)


@given(st.text(alphabet="ab*", min_size=1, max_size=8), st.text(alphabet="ab", min_size=1, max_size=12))
def test_globs_of_accounts_agree_with_the_reference(glob: str, text: str) -> None:
    """A star in a match stands for one or more characters."""
    rule = Entry((glob,), ("*",), ("x.example",), (), None)
    grant = outcome(lambda: policy(rule).decide(identity(text), names("x.example"), None), CertmountError)
    assert isinstance(grant, Grant) == glob_fits(glob, text)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("stars", [2, 4, 8, 50])
def test_no_name_makes_a_pattern_slow(stars: int) -> None:
    """A pod chooses the names it asks for; the longest and worst of them is judged at once, however many stars a rule has."""
    rule = policy(everyone("https://example.com/" + "-".join("*" * stars) + "x"))
    with pytest.raises(CertmountError, match="no policy rule"):
        rule.decide(identity(), names("https://example.com/" + "-" * 2000), None)


@pytest.mark.parametrize(
    "hours, asked, granted",
    [
        (None, None, 24),
        (None, 24, 24),
        (None, 25, None),
        (1, None, 1),
        (1, 2, None),
        (1, 1, 1),
        (48, None, 24),
        (48, 48, 48),
        (48, 49, None),
    ],
)
def test_a_rule_limits_the_life_of_its_names(hours: int | None, asked: int | None, granted: int | None) -> None:
    """Not asked for: a day or the limit if that is less; asked for: as asked up to the limit, never silently less."""
    duration = None if asked is None else timedelta(hours=asked)
    rules = policy(everyone("x.example", hours=hours))
    grant = outcome(lambda: rules.decide(identity(), names("x.example"), duration), CertmountError)
    if isinstance(grant, Grant):
        assert grant.duration == timedelta(hours=granted or 0)
    else:
        assert granted is None
        assert f"the most is {hours or 24}h" in str(grant)


@pytest.mark.parametrize("hours", [(1, 12), (12, 1), (1, 12, 2)])
def test_the_longest_life_of_the_rules_that_allow_a_name_counts(hours: tuple[int, ...]) -> None:
    """Each name lives as long as its most generous rule says, all of them together as long as the least of these."""
    rules = policy(*(everyone("x.example", hours=limit) for limit in hours), everyone("y.example", hours=2))
    assert rules.decide(identity(), names("x.example"), None).duration == timedelta(hours=12)
    assert rules.decide(identity(), names("x.example", "y.example"), None).duration == timedelta(hours=2)


@given(st.timedeltas(max_value=LEAST_DURATION - timedelta(milliseconds=1), min_value=timedelta(days=-400)))
def test_a_life_too_short_to_renew_is_refused(duration: timedelta) -> None:
    """Zero and negative lives too, whoever sends them; the least life itself is granted."""
    assert policy().decide(identity(), Names(), LEAST_DURATION).duration == LEAST_DURATION
    with pytest.raises(CertmountError, match="too short; the least is 10s"):
        policy().decide(identity(), Names(), duration)


def test_every_refused_name_is_told_at_once() -> None:
    """The answer lists each name with the service account, so that an administrator can write one rule for all."""
    with pytest.raises(CertmountError) as raised:
        policy(everyone("x.example")).decide(
            identity(), names("x.example", "y.example", "https://z.example/"), timedelta(days=2)
        )
    assert raised.value.reason is Reason.NAME_REFUSED
    assert not raised.value.retryable
    text = str(raised.value)
    assert "y.example: no policy rule allows this name for service account web/edge" in text
    assert "https://z.example/: no policy rule" in text
    assert "duration: 48h is longer" in text
    assert "x.example" not in text.replace("policy rule", "").split("y.example")[0]


@given(st.one_of(patterns, strategies.hostile_texts, st.text(alphabet=string.printable, max_size=30)))
def test_any_text_is_a_pattern_or_a_problem_in_words(text: str) -> None:
    """Whatever an administrator writes in a pattern's place."""
    for make in (NamePattern.for_dns, NamePattern.for_uri):
        pattern = outcome(functools.partial(make, text, DOMAINS), PatternProblem)
        if isinstance(pattern, NamePattern):
            assert not pattern.matches("nothing.of.the.kind", values_of(identity())) or "*" in text
        else:
            assert str(pattern)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{sevice}.example", r"unknown placeholder \{sevice\}; known are \{namespace\}, "),
        ("**.example", r"\*\*"),
        ("a b.example", "characters"),
        ("Example.com", "characters"),
        ("{pod.example", "characters"),
        ("", "empty"),
    ],
)
def test_why_a_text_is_no_pattern_is_said(text: str, problem: str) -> None:
    """Slips in a policy are found when it is read, not when a pod waits."""
    with pytest.raises(PatternProblem, match=problem):
        NamePattern.for_dns(text, DOMAINS)


@pytest.mark.parametrize(
    "pattern, name",
    [
        ("spiffe://{trust_domain}", "spiffe://td.example"),
        ("https://www.{cluster_domain}/", "https://www.cluster.local/"),
        ("https://example.com/{namespace}/*", "https://example.com/web/x"),
        ("https://example.com/{pod}-*/a*z", "https://example.com/edge-0-x/abcz"),
    ],
)
def test_a_uri_pattern_allows_what_it_says(pattern: str, name: str) -> None:
    """A host alone, the administrator's domains in it, values and stars in the path."""
    assert policy(everyone(pattern)).decide(identity(), names(name), None).names.uris[1:] == names(name).uris


@pytest.mark.parametrize(
    "text",
    ["example.com", "https:/example.com", "*://example.com/", "https://*/", "https://*.example.com/", "https://{pod}/",
     "https://{pod}.example.com/a", "{namespace}://example.com/", "spiffe:///a", "https//example.com/a", "https:/x/example.com/a", "https://example.com/%41"],
)  # fmt: skip
def test_a_uri_pattern_writes_out_scheme_and_host(text: str) -> None:
    """No pod's name and no star decides on a host: there a dot in a pod's name would be another host."""
    with pytest.raises(PatternProblem):
        NamePattern.for_uri(text, DOMAINS)
