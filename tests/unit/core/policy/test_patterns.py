"""Name patterns and IP ranges."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError
from csi_driver.core.names import URI, DNSName, EmailAddress
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.policy.patterns import InvalidPattern, IPRange, NamePattern
from csi_driver.core.spec import MAX_NAMES
from csi_driver.core.subject import SubjectAttribute
from tests.unit.core import strategies
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import names
from tests.unit.core.policy import policies
from tests.unit.core.policy.policies import DOMAINS, decide, pods, policy, rule_for_all, subject
from tests.unit.core.policy.reference import Pod, kind_of
from tests.unit.core.policy.test_reference import HOSTILE_VALUES

VALUES = {"namespace": "web", "service_account": "edge", "pod": "edge-0"}


@given(st.sampled_from(HOSTILE_VALUES), st.sampled_from(["pod", "service_account", "namespace"]), strategies.dns_texts)
@example("a.b.example", "pod", "a.b.example")
def test_value_that_is_not_a_label_matches_nothing(value: str, placeholder: str, name: str) -> None:
    pattern = NamePattern.for_dns(f"{{{placeholder}}}.svc.example", DOMAINS)
    values = {**VALUES, placeholder: value}
    for text in (name, f"{value}.svc.example", "x.svc.example", "*.svc.example", "a.svc.example"):
        assert not pattern.matches(text, values)


@given(st.sampled_from(HOSTILE_VALUES), strategies.dns_texts)
def test_service_that_is_not_a_label_matches_nothing(value: str, name: str) -> None:
    pattern = NamePattern.for_dns("{service}.web.svc", DOMAINS)
    for text in (name, f"{value}.web.svc", "x.web.svc", "*.web.svc", "a.b.example.web.svc"):
        assert not pattern.matches(text, VALUES, (value,))


@given(
    policies.dns_patterns,
    pods,
    st.lists(st.sampled_from(["a", "b", "ab", "example"]), min_size=2, max_size=4),
    strategies.labels,
)
def test_wildcard_is_allowed_only_with_all_covered_names(pattern: str, pod: Pod, labels: list[str], label: str) -> None:
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
def test_only_a_star_label_allows_a_wildcard(pattern: str, granted: bool) -> None:
    assert isinstance(decide(policy(rule_for_all(pattern)), "*.example.com"), Grant) == granted


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
def test_service_placeholder_matches_each_service_of_the_pod(pattern: str, name: str, granted: bool) -> None:
    assert isinstance(decide(policy(rule_for_all(pattern)), name, pod=SHOP), Grant) == granted
    assert not isinstance(decide(policy(rule_for_all(pattern)), name), Grant)


@given(st.one_of(policies.text_patterns, strategies.hostile_texts, st.text(alphabet=string.printable, max_size=30)))
def test_any_text_is_a_pattern_or_an_invalid_pattern(text: str) -> None:
    for make in (NamePattern.for_dns, NamePattern.for_uri, NamePattern.for_email):
        pattern = outcome(functools.partial(make, text, DOMAINS), InvalidPattern)
        if isinstance(pattern, NamePattern):
            assert not pattern.matches("nothing.of.the.kind", VALUES) or "*" in text
        else:
            assert str(pattern)
    assert isinstance(outcome(lambda: IPRange.parse(text), InvalidPattern), IPRange | InvalidPattern)


_Parse = Callable[[str], DNSName | URI | EmailAddress | SubjectAttribute]
MAKERS: list[tuple[Callable[..., NamePattern], _Parse]] = [
    (NamePattern.for_dns, DNSName.parse),
    (NamePattern.for_uri, URI.parse),
    (NamePattern.for_email, EmailAddress.parse),
    (NamePattern.for_subject, SubjectAttribute.parse),
]
ONES = dict.fromkeys(("namespace", "service_account", "pod"), "a")
pattern_texts = st.one_of(
    policies.text_patterns,
    st.lists(
        st.sampled_from(
            [*"ab1-_.*@/:", "A", "{pod}", "{service}", "{trust_domain}", "://", "spiffe://", "x" * 40, "..", "CN="]
        ),
        max_size=14,
    ).map("".join),
)


@given(pattern_texts, st.sampled_from(MAKERS))
def test_every_pattern_matches_a_valid_name(text: str, maker: tuple[Callable[..., NamePattern], _Parse]) -> None:
    make, parse = maker
    pattern = outcome(lambda: make(text, DOMAINS), InvalidPattern)
    if isinstance(pattern, InvalidPattern):
        return
    assert parse(pattern.example).text == pattern.example
    assert pattern.matches(pattern.example, ONES, ("a",))


@given(st.one_of(strategies.dns_texts, strategies.uri_texts, strategies.email_texts), st.data())
def test_every_pattern_that_matches_a_valid_name_is_accepted(name: str, data: st.DataObject) -> None:
    """A pattern that is a valid name with stars for some of its characters."""
    text = str(next(iter(names(name))))
    kind = kind_of(text)
    make = {"dns": NamePattern.for_dns, "uris": NamePattern.for_uri, "emails": NamePattern.for_email}[kind]
    start = text.index("/", text.index("://") + 3) + 1 if kind == "uris" and text.count("/") > 2 else 0
    letters = [index for index in range(start, len(text)) if text[index].isalnum()] if start or kind != "uris" else []
    chosen = data.draw(st.sets(st.sampled_from(letters))) if letters else set()
    star = "".join("*" if index in chosen else character for index, character in enumerate(text))
    pattern = make(re.sub(r"\*+", "*", star), DOMAINS)
    assert pattern.matches(text, VALUES)


@pytest.mark.parametrize(
    "make, text, problem",
    [
        (NamePattern.for_dns, "{sevice}.example", r"unknown placeholder \{sevice\}; use \{namespace\}, "),
        (NamePattern.for_dns, "**.example", r"\*\*"),
        (NamePattern.for_dns, "a b.example", "characters"),
        (NamePattern.for_dns, "Example.com", "characters"),
        (NamePattern.for_dns, "{pod.example", "characters"),
        (NamePattern.for_dns, "", "empty"),
        (NamePattern.for_dns, "a" * 2049, "at most 2048"),
        (NamePattern.for_email, "example.com", "form name@domain"),
        (NamePattern.for_email, "a@b@example.com", "form name@domain"),
        (NamePattern.for_email, "@example.com", "characters"),
        (NamePattern.for_email, "a@", "characters"),
        (NamePattern.for_email, "a@Example.com", "characters"),
        (NamePattern.for_email, "a%b@example.com", "characters"),
        (NamePattern.for_email, "", "form name@domain"),
    ],
)
def test_invalid_pattern_is_rejected_with_a_reason(make: Callable[..., NamePattern], text: str, problem: str) -> None:
    with pytest.raises(InvalidPattern, match=problem):
        make(text, DOMAINS)


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
def test_pattern_allows_names_of_its_type(pattern: str, name: str, granted: bool) -> None:
    result = decide(policy(rule_for_all(pattern)), name)
    assert isinstance(result, Grant) == granted
    if isinstance(result, Grant):
        assert set(names(name)) <= set(result.names)


@pytest.mark.parametrize(
    "text",
    ["example.com", "https:/example.com", "*://example.com/", "https://*/", "https://*.example.com/", "https://{pod}/",
     "https://{pod}.example.com/a", "https://{service}/a", "{namespace}://example.com/", "spiffe:///a", "https//example.com/a", "https:/x/example.com/a", "https://example.com/%41"],
)  # fmt: skip
def test_uri_pattern_requires_a_literal_scheme_and_host(text: str) -> None:
    """A dot in a pod's name would be another host."""
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
def test_invalid_ip_range_is_rejected_with_a_reason(text: str, problem: str) -> None:
    with pytest.raises(InvalidPattern, match=problem):
        IPRange.parse(text)


def test_ip_range_text() -> None:
    texts = [str(IPRange.parse(text)) for text in ("10.0.0.0/8", "10.0.0.1", "fd00::1/128")]
    assert texts == ["10.0.0.0/8", "10.0.0.1", "fd00::1"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("stars", [2, 4, 8, 50])
def test_matching_time_is_linear(stars: int) -> None:
    """A pod chooses the names."""
    rules = policy(rule_for_all("https://example.com/" + "-".join("*" * stars) + "x"))
    result = decide(rules, "https://example.com/" + "-" * 2000)
    assert isinstance(result, CertmountError)
    assert "no policy rule" in str(result)


@pytest.mark.timeout(20)
def test_number_of_services_is_limited() -> None:
    """A tenant can create thousands of Services that select one pod."""
    pod = Pod("web", "edge", "edge-0", services=tuple(f"s{number:05}" for number in range(10_000)))
    patterns = [f"*{{service}}*.{{service}}.x{number}.example" for number in range(100)]
    wanted = [f"{'s0' * 30}.s.x{number}.example" for number in range(100)]
    assert isinstance(decide(policy(rule_for_all(*patterns)), *wanted, pod=pod), CertmountError)
    assert len(policy().decide(subject(pod), RequestedCertificate()).names) == MAX_NAMES - 1
