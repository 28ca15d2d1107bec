"""Patterns of names: what they mean, whatever stands in their placeholders, and why a text is none."""

from __future__ import annotations

import functools
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError
from csi_driver.core.names import IPAddress
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.policy.patterns import InvalidPattern, IPRange, NamePattern
from csi_driver.core.spec import MAX_NAMES
from tests.unit.core import strategies
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import names
from tests.unit.core.policy.policies import (
    DOMAINS,
    decide,
    dns_patterns,
    everyone,
    pods,
    policy,
    subject,
    text_patterns,
)
from tests.unit.core.policy.reference import Pod
from tests.unit.core.policy.test_reference import HOSTILE_VALUES

VALUES = {"namespace": "web", "service_account": "edge", "pod": "edge-0"}


@given(st.sampled_from(HOSTILE_VALUES), st.sampled_from(["pod", "service_account", "namespace"]), strategies.dns_texts)
@example("a.b.example", "pod", "a.b.example")
def test_a_hostile_value_matches_nothing(value: str, placeholder: str, name: str) -> None:
    """A value that is no single label, put alone into a DNS pattern's label, allows no name whatever."""
    pattern = NamePattern.for_dns(f"{{{placeholder}}}.svc.example", DOMAINS)
    values = {**VALUES, placeholder: value}
    for text in (name, f"{value}.svc.example", "x.svc.example", "*.svc.example", "a.svc.example"):
        assert not pattern.matches(text, values)


@given(st.sampled_from(HOSTILE_VALUES), strategies.dns_texts)
def test_a_hostile_service_matches_nothing(value: str, name: str) -> None:
    """The same for a Service's name, should an API server ever let such a one pass."""
    pattern = NamePattern.for_dns("{service}.web.svc", DOMAINS)
    for text in (name, f"{value}.web.svc", "x.web.svc", "*.web.svc", "a.b.example.web.svc"):
        assert not pattern.matches(text, VALUES, (value,))


@given(
    dns_patterns,
    pods,
    st.lists(st.sampled_from(["a", "b", "ab", "example"]), min_size=2, max_size=4),
    strategies.labels,
)
def test_a_wildcard_is_granted_only_where_all_it_covers_is(
    pattern: str, pod: Pod, labels: list[str], label: str
) -> None:
    """A certificate for ``*.x`` serves every name one label below ``x``; so each of these is allowed by itself."""
    made = NamePattern.for_dns(pattern, DOMAINS)
    values = next(pod.values())
    wildcard, covered = (".".join([first, *labels]) for first in ("*", label))
    assert not made.matches(wildcard, values, pod.services) or made.matches(covered, values, pod.services)


@pytest.mark.parametrize(
    "pattern, granted",
    [
        ("*.example.com", True),
        ("*.*.com", True),
        ("a*.example.com", False),
        ("*-a.example.com", False),
        ("{pod}.example.com", False),
        ("{service}.example.com", False),
        ("www.example.com", False),
        ("*.com", False),
        ("*.*.example.com", False),
    ],
)
def test_a_wildcard_name_needs_a_bare_star(pattern: str, granted: bool) -> None:
    """``*.example.com`` is granted by a pattern whose first label is ``*`` and nothing else."""
    assert isinstance(decide(policy(everyone(pattern)), "*.example.com"), Grant) == granted


SHOP = Pod("web", "edge", "edge-0", services=("shop", "api"))


@pytest.mark.parametrize(
    "pattern, name, granted",
    [
        ("{service}.example.com", "shop.example.com", True),
        ("{service}.example.com", "api.example.com", True),
        ("{service}.example.com", "bank.example.com", False),
        ("{pod}.{service}.example.com", "edge-0.api.example.com", True),
        ("{service}-*.example.com", "api-blue.example.com", True),
        ("{service}-*.example.com", "apiblue.example.com", False),
        ("{service}.{service}.example.com", "api.api.example.com", True),
        ("{service}.{service}.example.com", "shop.api.example.com", False),
        ("https://example.com/{service}", "https://example.com/shop", True),
        ("https://example.com/{service}", "https://example.com/bank", False),
        ("{service}@example.com", "shop@example.com", True),
        ("{service}@example.com", "Shop@example.com", False),
    ],
)
def test_a_service_stands_for_each_service_of_the_pod(pattern: str, name: str, granted: bool) -> None:
    """One Service at a time, in all its places; no name of a Service that does not select the pod."""
    assert isinstance(decide(policy(everyone(pattern)), name, pod=SHOP), Grant) == granted
    assert not isinstance(decide(policy(everyone(pattern)), name), Grant)


@given(st.one_of(text_patterns, strategies.hostile_texts, st.text(alphabet=string.printable, max_size=30)))
def test_any_text_is_a_pattern_or_a_problem_in_words(text: str) -> None:
    """Whatever an administrator writes in a pattern's place."""
    for make in (NamePattern.for_dns, NamePattern.for_uri, NamePattern.for_email):
        pattern = outcome(functools.partial(make, text, DOMAINS), InvalidPattern)
        if isinstance(pattern, NamePattern):
            assert not pattern.matches("nothing.of.the.kind", VALUES) or "*" in text
        else:
            assert str(pattern)
    assert isinstance(outcome(lambda: IPRange.parse(text), InvalidPattern), IPRange | InvalidPattern)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{sevice}.example", r"unknown placeholder \{sevice\}; use \{namespace\}, "),
        ("**.example", r"\*\*"),
        ("a b.example", "characters"),
        ("Example.com", "characters"),
        ("{pod.example", "characters"),
        ("", "empty"),
        ("a" * 2049, "at most 2048"),
    ],
)
def test_why_a_text_is_no_pattern_is_said(text: str, problem: str) -> None:
    """Slips in a policy are found when it is read, not when a pod waits."""
    with pytest.raises(InvalidPattern, match=problem):
        NamePattern.for_dns(text, DOMAINS)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("example.com", "form name@domain"),
        ("a@b@example.com", "form name@domain"),
        ("@example.com", "characters"),
        ("a@", "characters"),
        ("a@Example.com", "characters"),
        ("a%b@example.com", "characters"),
        ("", "form name@domain"),
    ],
)
def test_why_a_text_is_no_pattern_of_addresses_is_said(text: str, problem: str) -> None:
    """The same for e-mail addresses."""
    with pytest.raises(InvalidPattern, match=problem):
        NamePattern.for_email(text, DOMAINS)


@pytest.mark.parametrize(
    "pattern, name, granted",
    [
        ("spiffe://{trust_domain}", "spiffe://td.example", True),
        ("https://www.{cluster_domain}/", "https://www.cluster.local/", True),
        ("https://example.com/{namespace}/*", "https://example.com/web/x", True),
        ("https://example.com/{namespace}/*", "https://example.com/web/x/y", False),
        ("https://example.com/{pod}-*/a*z", "https://example.com/edge-0-x/abcz", True),
        ("{service_account}@{namespace}.example.com", "edge@web.example.com", True),
        ("{service_account}@{namespace}.example.com", "edge@shop.example.com", False),
        ("*@example.com", "a.b@example.com", True),
        ("*@example.com", "a@www.example.com", False),
        ("*@*.example.com", "a@www.example.com", True),
        ("*@*.example.com", "a@b.www.example.com", False),
        ("team-*@example.com", "team-a@example.com", True),
        ("team-*@example.com", "Team-a@example.com", False),
        ("example.com", "a@example.com", False),
        ("*.example.com", "a@b.example.com", False),
        ("10.0.0.0/8", "10.255.0.1", True),
        ("10.0.0.0/8", "11.0.0.1", False),
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.7", "10.0.0.8", False),
        ("fd00::/8", "fd12::1", True),
        ("fd00::/8", "fc00::1", False),
        ("::/0", "10.0.0.1", False),
        ("0.0.0.0/0", "::1", False),
    ],
)
def test_a_pattern_allows_what_it_says(pattern: str, name: str, granted: bool) -> None:
    """Each kind allows names of its own kind only, one part for one part."""
    result = decide(policy(everyone(pattern)), name)
    assert isinstance(result, Grant) == granted
    if isinstance(result, Grant):
        assert set(names(name)) <= set(result.names)


@pytest.mark.parametrize(
    "text",
    ["example.com", "https:/example.com", "*://example.com/", "https://*/", "https://*.example.com/", "https://{pod}/",
     "https://{pod}.example.com/a", "https://{service}/a", "{namespace}://example.com/", "spiffe:///a", "https//example.com/a", "https:/x/example.com/a", "https://example.com/%41"],
)  # fmt: skip
def test_a_uri_pattern_writes_out_scheme_and_host(text: str) -> None:
    """No pod's name and no star decides on a host: there a dot in a pod's name would be another host."""
    with pytest.raises(InvalidPattern):
        NamePattern.for_uri(text, DOMAINS)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("10.0.0.1/8", "bits set after the prefix; use 10.0.0.0/8 for that range"),
        ("fd00::1/64", "use fd00::/64 for that range"),
        ("10.0.0.0/255.0.0.0", "is not an IP address or range"),
        ("10.0.0.0/33", "is not an IP address or range"),
        ("10.0.0.0/-1", "is not an IP address or range"),
        ("10.0.*.*", "is not an IP address or range"),
        ("010.0.0.1", "is not an IP address or range"),
        ("fe80::1%eth0", "is not an IP address or range"),
        ("::ffff:10.0.0.0/104", "IPv4-mapped IPv6 addresses, which no certificate contains; use IPv4"),
        ("", "is not an IP address or range"),
    ],
)
def test_why_a_text_is_no_range_is_said(text: str, problem: str) -> None:
    """What could be read as another range than was meant is refused."""
    with pytest.raises(InvalidPattern, match=problem):
        IPRange.parse(text)


def test_a_range_is_shown_as_it_is_written() -> None:
    """An address as an address, a network with its length."""
    assert [str(IPRange.parse(text)) for text in ("10.0.0.0/8", "10.0.0.1", "fd00::1/128")] == [
        "10.0.0.0/8",
        "10.0.0.1",
        "fd00::1",
    ]
    assert IPRange.parse("10.0.0.0/31").matches(IPAddress.parse("10.0.0.1"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("stars", [2, 4, 8, 50])
def test_no_name_makes_a_pattern_slow(stars: int) -> None:
    """A pod chooses the names it asks for; the longest and worst of them is judged at once, however many stars a rule has."""
    rules = policy(everyone("https://example.com/" + "-".join("*" * stars) + "x"))
    refusal = decide(rules, "https://example.com/" + "-" * 2000)
    assert isinstance(refusal, CertmountError)
    assert "no policy rule" in str(refusal)


@pytest.mark.timeout(20)
def test_no_number_of_services_makes_a_decision_slow() -> None:
    """Who may make Services may make thousands that select one pod: a fixed number of them is looked at."""
    pod = Pod("web", "edge", "edge-0", services=tuple(f"s{number:05}" for number in range(10_000)))
    patterns = [f"*{{service}}*.{{service}}.x{number}.example" for number in range(100)]
    wanted = [f"{'s0' * 30}.s.x{number}.example" for number in range(100)]
    assert isinstance(decide(policy(everyone(*patterns)), *wanted, pod=pod), CertmountError)
    assert len(policy().decide(subject(pod), RequestedCertificate()).names) == MAX_NAMES - 1
