"""A name is valid by construction: what is accepted may stand in a certificate, and means one thing only."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.names import URI, DNSName, NameProblem, Names, parse_trust_domain, spiffe_id
from tests.unit.core.outcomes import outcome
from tests.unit.core.strategies import dns_texts, hostile_texts, https_texts, uri_texts


@given(dns_texts)
def test_a_dns_name_is_taken_in_any_case_and_kept_in_lower_case(text: str) -> None:
    """Case does not matter in DNS (RFC 4343): one name has one form."""
    assert DNSName.parse(text.upper()) == DNSName.parse(text)
    assert str(DNSName.parse(text)) == text


@given(st.one_of(hostile_texts, dns_texts))
def test_any_text_is_a_dns_name_by_the_rfcs_or_a_problem_in_words(text: str) -> None:
    """What is accepted keeps RFC 1123's lengths and characters; what is not is told without control characters."""
    name = outcome(lambda: DNSName.parse(text), NameProblem)
    if isinstance(name, NameProblem):
        assert str(name).isprintable()
        return
    labels = name.text.removeprefix("*.").split(".")
    assert len(name.text) <= 253
    assert all(1 <= len(label) <= 63 and label.strip("-") == label for label in labels)
    assert set(name.text.removeprefix("*.")) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert name.is_wildcard == text.startswith("*.")
    assert not name.is_wildcard or len(labels) >= 2


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "empty"),
        ("bücher.example", "xn--"),
        ("example.com.", "dot"),
        (".".join(["a" * 49] * 6), "at most 253"),
        ("a" * 64 + ".example", "1-63"),
        ("a..example", "1-63"),
        ("a b.example", "1-63"),
        ("a\x00.example", r"'a\\x00'"),
        ("-a.example", "inner hyphens"),
        ("a_b.example", "1-63"),
        ("*", "top-level"),
        ("*.com", "top-level"),
        ("a.*.example.com", "whole first label"),
        ("w*.example.com", "whole first label"),
        ("*.*.example.com", "whole first label"),
        ("b" * 200 + ".example", f"the label '{'b' * 67}...'"),
        ("10.0.0.1", "IP address"),
        ("1", "number"),
        ("::1", "1-63"),
    ],
)
def test_why_a_text_is_no_dns_name_is_said(text: str, problem: str) -> None:
    """Each kind of slip has its own words."""
    with pytest.raises(NameProblem, match=problem):
        DNSName.parse(text)


def test_the_longest_names_are_taken() -> None:
    """253 characters of a DNS name (RFC 1035 section 2.3.4), 2048 of a URI (SPIFFE-ID section 2.3), and not one more."""
    longest = ".".join(["a" * 63] * 3 + ["b" * 61])
    assert len(DNSName.parse(longest).text) == 253
    with pytest.raises(NameProblem, match="is 254 characters long"):
        DNSName.parse(longest + "b")
    assert len(URI.parse("https://example.com/".ljust(2048, "a")).text) == 2048
    with pytest.raises(NameProblem, match="is 2049 characters long"):
        URI.parse("https://example.com/".ljust(2049, "a"))


@given(uri_texts)
def test_a_uri_is_kept_as_it_is(text: str) -> None:
    """URIs are compared byte by byte by those who read them, so not a byte is changed."""
    assert str(URI.parse(text)) == text


@given(st.one_of(hostile_texts, uri_texts, https_texts.map(lambda text: text + "/%2e%2E/.%2e/%zz/%")))
def test_any_text_is_a_uri_without_ambiguity_or_a_problem_in_words(text: str) -> None:
    """An accepted URI has a host, no user, port, query or fragment, and a path that no normalising would change."""
    uri = outcome(lambda: URI.parse(text), NameProblem)
    if isinstance(uri, NameProblem):
        assert str(uri).isprintable()
        return
    parts = urlsplit(uri.text)
    assert parts.netloc
    assert parts.netloc == parts.hostname
    assert not parts.query
    assert not parts.fragment
    assert not {".", ".."} & set(uri.text.split("/"))
    assert "%" not in uri.text
    assert x509.UniformResourceIdentifier(uri.text).value == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.com",
        "https:///path",
        "HTTPS://example.com/",
        "https://Example.com/",
        "https://user@example.com/",
        "https://example.com:443/",
        "https://example.com/?query",
        "https://example.com/#fragment",
        "https://example.com/a b",
        "https://example.com/\x00",
        "https://exämple.com/",
        "https://[::1]/",
        "https://example.com/" + "a" * 2048,
        "https://example.com/a/../b",
        "https://example.com/a/./b",
        "https://example.com/a/%2e%2E/b",
        "https://example.com/a/.%2e/b",
        "https://example.com/%zz",
        "https://example.com/%2",
        "spiffe://example.com/",
        "spiffe://example.com/a//b",
        "spiffe://example.com/a/",
        "spiffe://example.com/a/../b",
        "spiffe://example.com/a%20b",
        "spiffe://example.com/a+b",
        "spiffe://Example.com/a",
        "spiffe://" + "a" * 256 + "/a",
    ],
)
def test_a_uri_that_could_be_read_in_two_ways_is_refused(text: str) -> None:
    """Dot segments and encodings of them too: what a policy matched must be what a reader sees (RFC 3986 section 6.2.2)."""
    with pytest.raises(NameProblem):
        URI.parse(text)


@given(st.lists(dns_texts, max_size=6), st.lists(uri_texts, max_size=6))
def test_names_are_each_once_in_the_order_asked_for(dns: list[str], uris: list[str]) -> None:
    """Repetitions go, order stays: the first name is the one that people see."""
    names = Names.of(map(DNSName.parse, dns + dns), map(URI.parse, uris + uris))
    assert [name.text for name in names.dns] == list(dict.fromkeys(dns))
    assert [uri.text for uri in names.uris] == list(dict.fromkeys(uris))
    assert len(names) == len(set(dns)) + len(set(uris))
    assert str(names) == ", ".join([*dict.fromkeys(dns), *dict.fromkeys(uris)])


def test_the_longest_names_of_kubernetes_make_a_spiffe_id() -> None:
    """A trust domain of 255, a namespace of 63 and a service account of 253 characters are no trouble."""
    uri = spiffe_id("a" * 255, "n" * 63, "s" * 253)
    assert uri.text == f"spiffe://{'a' * 255}/ns/{'n' * 63}/sa/{'s' * 253}"


@given(hostile_texts)
def test_a_trust_domain_is_one_or_a_problem_in_words(text: str) -> None:
    """What is accepted makes a SPIFFE ID; all else is a NameProblem."""
    domain = outcome(lambda: parse_trust_domain(text), NameProblem)
    if isinstance(domain, NameProblem):
        assert str(domain).isprintable()
    else:
        assert spiffe_id(domain, "n", "s").text == f"spiffe://{domain}/ns/n/sa/s"
