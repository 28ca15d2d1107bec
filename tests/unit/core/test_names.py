"""Names: only valid and unambiguous texts are accepted."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.names import (
    URI,
    DNSName,
    EmailAddress,
    InvalidName,
    IPAddress,
    Names,
    parse_dns_label,
    parse_trust_domain,
    spiffe_id,
)
from tests.unit.core.outcomes import outcome
from tests.unit.core.strategies import dns_texts, email_texts, hostile_texts, https_texts, ip_texts, uri_texts


@given(dns_texts)
def test_dns_name_is_converted_to_lower_case(text: str) -> None:
    """RFC 4343."""
    assert DNSName.parse(text.upper()) == DNSName.parse(text)
    assert str(DNSName.parse(text)) == text


@given(st.one_of(hostile_texts, dns_texts))
def test_any_text_is_a_valid_dns_name_or_an_invalid_name(text: str) -> None:
    """RFC 1123."""
    name = outcome(lambda: DNSName.parse(text), InvalidName)
    if isinstance(name, InvalidName):
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
        ("xn--a.example", "the label 'xn--a', which is not the xn-- form"),
        ("xn--bcher-kva9999999999.example", "xn-- form"),
        ("*.xn--a.example", "xn-- form"),
        ("xn---fsq.example", "xn-- form"),
        ("example.com.", "dot"),
        (".".join(["a" * 49] * 6), "at most 253"),
        ("a" * 64 + ".example", "1 to 63"),
        ("a..example", "1 to 63"),
        ("a b.example", "1 to 63"),
        ("a\x00.example", r"'a\\x00'"),
        ("-a.example", "inner hyphens"),
        ("a_b.example", "1 to 63"),
        ("*", "top-level"),
        ("*.com", "top-level"),
        ("a.*.example.com", "complete first label"),
        ("w*.example.com", "complete first label"),
        ("*.*.example.com", "complete first label"),
        ("b" * 200 + ".example", f"the label '{'b' * 67}...'"),
        ("10.0.0.1", "IP address"),
        ("1", "number"),
        ("::1", "1 to 63"),
    ],
)
def test_invalid_dns_name_is_rejected_with_a_reason(text: str, problem: str) -> None:
    with pytest.raises(InvalidName, match=problem):
        DNSName.parse(text)


@pytest.mark.parametrize("text", ["bücher", "straße", "παράδειγμα", "пример", "例え", "نامه\u200cای", "💩"])
def test_internationalized_names_are_accepted_in_their_xn_form(text: str) -> None:
    label = "xn--" + text.encode("punycode").decode()
    for name in (f"{label}.example", f"*.{label}.example", f"{label.upper()}.EXAMPLE"):
        assert DNSName.parse(name).text == name.lower()


@pytest.mark.parametrize(
    "text", ["BÜCHER", "bu\u0308cher", "bü cher", "b\u00a0ü", "b\u200bü", "bü\u202e", "bü\ufeff", "\ud800ü", "\u0378ü"]
)
def test_internationalized_names_have_one_visible_form(text: str) -> None:
    """Neither upper case, nor two forms of one letter, nor invisible characters."""
    encoded = text.encode("punycode", errors="surrogatepass").decode()
    with pytest.raises(InvalidName):
        DNSName.parse(f"xn--{encoded}.example")


def test_length_of_names_is_limited() -> None:
    """RFC 1035 section 2.3.4; SPIFFE-ID section 2.3."""
    longest = ".".join(["a" * 63] * 3 + ["b" * 61])
    assert len(DNSName.parse(longest).text) == 253
    with pytest.raises(InvalidName, match="is 254 characters long"):
        DNSName.parse(longest + "b")
    assert len(URI.parse("https://example.com/".ljust(2048, "a")).text) == 2048
    with pytest.raises(InvalidName, match="is 2049 characters long"):
        URI.parse("https://example.com/".ljust(2049, "a"))


@given(uri_texts)
def test_uri_is_unchanged(text: str) -> None:
    """Clients compare URIs byte by byte."""
    assert str(URI.parse(text)) == text


@given(st.one_of(hostile_texts, uri_texts, https_texts.map(lambda text: text + "/%2e%2E/.%2e/%zz/%")))
def test_any_text_is_an_unambiguous_uri_or_an_invalid_name(text: str) -> None:
    uri = outcome(lambda: URI.parse(text), InvalidName)
    if isinstance(uri, InvalidName):
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


AMBIGUOUS = f"""
example.com https:///path HTTPS://example.com/ https://Example.com/ https://user@example.com/ https://example.com:443/
https://example.com/?query https://example.com/#fragment https://exämple.com/ https://[::1]/ https://example.com/{"a" * 2048}
https://example.com/a/../b https://example.com/a/./b https://example.com/a/%2e%2E/b https://example.com/a/.%2e/b
https://example.com/%zz https://example.com/%2 spiffe://example.com/ spiffe://example.com/a//b spiffe://example.com/a/
spiffe://example.com/a/../b spiffe://example.com/a%20b spiffe://example.com/a+b spiffe://Example.com/a spiffe://{"a" * 256}/a
"""


@pytest.mark.parametrize("host", [".", "..", ".a", "a.", "a..b", "1.2.3.4."])
def test_host_with_an_empty_label_is_rejected(host: str) -> None:
    """Go cannot parse a certificate with such a URI, so the API server could not either."""
    for text in (f"https://{host}/x", f"spiffe://{host}/x"):
        with pytest.raises(InvalidName, match="has a host that begins or ends with a dot, or has two dots together"):
            URI.parse(text)
    with pytest.raises(InvalidName, match="is not a trust domain"):
        parse_trust_domain(host)


@pytest.mark.parametrize("text", ["", "https://example.com/a b", "https://example.com/\x00", *AMBIGUOUS.split()])
def test_ambiguous_uri_is_rejected(text: str) -> None:
    """The policy and clients must see the same URI (RFC 3986 section 6.2.2)."""
    with pytest.raises(InvalidName):
        URI.parse(text)


@given(st.ip_addresses())
def test_ip_address_is_canonical(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        with pytest.raises(InvalidName, match=f"use {address.ipv4_mapped}"):
            IPAddress.parse(str(address))
        return
    for text in (str(address), address.exploded, address.exploded.upper()):
        assert IPAddress.parse(text) == IPAddress.parse(str(address))
        assert IPAddress.parse(text).address == address


@given(st.one_of(hostile_texts, ip_texts))
def test_any_text_is_a_canonical_ip_address_or_an_invalid_name(text: str) -> None:
    ip = outcome(lambda: IPAddress.parse(text), InvalidName)
    if isinstance(ip, InvalidName):
        assert str(ip).isprintable()
    else:
        assert str(ip) == ip.text == str(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "empty"),
        ("10.0.0.256", "is not an IP address, such as"),
        ("010.0.0.1", "is not an IP address"),
        ("10.0.0.0/8", "is not an IP address"),
        ("10.1", "is not an IP address"),
        ("167772161", "is not an IP address"),
        ("1٠.0.0.1", "is not an IP address"),
        (" 10.0.0.1", "is not an IP address"),
        ("[::1]", "is not an IP address"),
        ("fe80::1%eth0", "has a zone"),
        ("::ffff:10.0.0.1", "use 10.0.0.1"),
        ("localhost", "is not an IP address"),
    ],
)
def test_invalid_ip_address_is_rejected_with_a_reason(text: str, problem: str) -> None:
    with pytest.raises(InvalidName, match=problem):
        IPAddress.parse(text)


@given(email_texts)
def test_email_address_keeps_the_case_of_the_local_part(text: str) -> None:
    """RFC 5321 section 2.4."""
    local, _, domain = text.partition("@")
    assert str(EmailAddress.parse(f"{local}@{domain.upper()}")) == text
    assert x509.RFC822Name(text).value == text


@given(st.one_of(hostile_texts, email_texts))
def test_any_text_is_a_valid_email_address_or_an_invalid_name(text: str) -> None:
    """Cryptography accepts each valid address, although email.utils differs between Python versions."""
    email = outcome(lambda: EmailAddress.parse(text), InvalidName)
    if isinstance(email, InvalidName):
        assert str(email).isprintable()
        return
    local, domain = email.text.split("@")
    assert DNSName.parse(domain).text == domain
    assert not set(local) & set('*{}%!`"\\(),:;<>[] \x00\n')
    assert 1 <= len(local) <= 64
    assert x509.RFC822Name(email.text).value == email.text


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "empty"),
        ("shop", "of the form name@domain"),
        ("@example.com", "of the form name@domain"),
        ("a@", "has a domain that is empty"),
        ("a@b@example.com", "has a domain that has the label 'b@example'"),
        (".a@example.com", "of the form"),
        ("a..b@example.com", "of the form"),
        ("a.@example.com", "of the form"),
        ('"a b"@example.com', "of the form"),
        ("a b@example.com", "of the form"),
        ("a%b@example.com", "of the form"),
        ("a!b@example.com", "of the form"),
        ("bücher@example.com", "of the form"),
        ("a@bücher.example", "has a domain that has non-ASCII characters"),
        ("a@*.example.com", "has a domain with a \\*"),
        ("a@[10.0.0.1]", "has a domain that"),
        ("a@10.0.0.1", "has a domain that is a number"),
        ("a" * 65 + "@example.com", "65 characters before the @; use at most 64"),
        ("a@" + "b" * 253, "255 characters long; an email address has at most 254"),
    ],
)
def test_invalid_email_address_is_rejected_with_a_reason(text: str, problem: str) -> None:
    with pytest.raises(InvalidName, match=problem):
        EmailAddress.parse(text)


@given(hostile_texts)
def test_dns_label_is_valid_or_an_invalid_name(text: str) -> None:
    word = outcome(lambda: parse_dns_label(text), InvalidName)
    assert isinstance(word, InvalidName) or DNSName.parse(f"{word}.example").text == f"{word}.example"


@given(st.lists(ip_texts, max_size=4), st.lists(email_texts, max_size=4))
def test_names_include_addresses(ips: list[str], emails: list[str]) -> None:
    names = Names.of(ips=map(IPAddress.parse, ips + ips), emails=map(EmailAddress.parse, emails + emails))
    assert [str(name) for name in names] == [*dict.fromkeys(ips), *dict.fromkeys(emails)]
    assert len(names) == len(set(ips)) + len(set(emails))


@given(st.lists(dns_texts, max_size=6), st.lists(uri_texts, max_size=6))
def test_names_have_no_duplicates_and_keep_their_order(dns: list[str], uris: list[str]) -> None:
    names = Names.of(map(DNSName.parse, dns + dns), map(URI.parse, uris + uris))
    assert [name.text for name in names.dns] == list(dict.fromkeys(dns))
    assert [uri.text for uri in names.uris] == list(dict.fromkeys(uris))
    assert len(names) == len(set(dns)) + len(set(uris))
    assert str(names) == ", ".join([*dict.fromkeys(dns), *dict.fromkeys(uris)])


def test_longest_kubernetes_names_are_a_valid_spiffe_id() -> None:
    uri = spiffe_id("a" * 255, "n" * 63, "s" * 253)
    assert uri.text == f"spiffe://{'a' * 255}/ns/{'n' * 63}/sa/{'s' * 253}"


@given(hostile_texts)
def test_trust_domain_is_valid_or_an_invalid_name(text: str) -> None:
    domain = outcome(lambda: parse_trust_domain(text), InvalidName)
    if isinstance(domain, InvalidName):
        assert str(domain).isprintable()
    else:
        assert spiffe_id(domain, "n", "s").text == f"spiffe://{domain}/ns/n/sa/s"
