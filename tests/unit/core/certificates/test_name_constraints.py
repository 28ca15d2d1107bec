"""Name constraints: as people write them, and which names they leave. That verifiers agree is shown in tests/peers."""

from __future__ import annotations

import ipaddress

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.certificates.name_constraints import (
    NameConstraintSet,
    format_constraint,
    parse_constraint,
    unsupported_kinds,
)
from csi_driver.core.names import URI, DNSName, EmailAddress, InvalidName, IPAddress, Names
from tests.unit.core import pki, strategies

GOOD = {
    "dns:example.com": x509.DNSName("example.com"),
    "DNS:Example.COM": x509.DNSName("example.com"),
    "dns:local": x509.DNSName("local"),
    "uri:cluster.local": x509.UniformResourceIdentifier("cluster.local"),
    "uri:.example.com": x509.UniformResourceIdentifier(".example.com"),
    "uri:my_domain": x509.UniformResourceIdentifier("my_domain"),
    "ip:10.0.0.0/8": x509.IPAddress(ipaddress.ip_network("10.0.0.0/8")),
    "ip:10.0.0.1": x509.IPAddress(ipaddress.ip_network("10.0.0.1/32")),
    "ip:fd00::/8": x509.IPAddress(ipaddress.ip_network("fd00::/8")),
    "email:example.com": x509.RFC822Name("example.com"),
    "email:.example.com": x509.RFC822Name(".example.com"),
    "email:Jo@Example.com": x509.RFC822Name("Jo@example.com"),
}


@pytest.mark.parametrize("text", GOOD)
def test_a_constraint_is_read_and_written(text: str) -> None:
    """What is printed can be written again."""
    constraint = parse_constraint(text)
    assert constraint == GOOD[text]
    assert parse_constraint(format_constraint(constraint)) == constraint


BAD = {
    "": "is not a name constraint; write dns:example.com",
    "example.com": "is not a name constraint",
    "host:example.com": "is not a name constraint",
    "dns:": "permits nothing",
    "dns:.example.com": "starts with a dot",
    "dns:*.example.com": "has a wildcard",
    "dns:a..b": "has the label",
    "uri:https://example.com": "is more than a host",
    "uri:example.com/path": "is more than a host",
    "uri:*.example.com": "is not a trust domain",
    "ip:10.0.0.1/8": "has host bits set",
    "ip:ten": "is not a range of IP addresses",
    "email:a@": "has a domain that is empty",
    "email:a b@example.com": "is not an e-mail address",
    "email:*.example.com": "has a wildcard",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_constraint_is_refused_in_words(text: str) -> None:
    """They follow the text that was written."""
    with pytest.raises(InvalidName) as refusal:
        parse_constraint(text)
    assert BAD[text] in str(refusal.value)


@given(st.builds("{}:{}".format, st.sampled_from(["dns", "uri", "ip", "email", "x"]), strategies.hostile_texts))
def test_no_text_does_worse_than_being_refused(text: str) -> None:
    """Whatever is written, it is a constraint that a certificate can hold, or a InvalidName."""
    try:
        constraint = parse_constraint(text)
    except InvalidName:
        return
    x509.NameConstraints([constraint], None).public_bytes()


def bounds(permitted: tuple[str, ...] = (), excluded: tuple[x509.GeneralName, ...] = ()) -> NameConstraintSet:
    found = [parse_constraint(text) for text in permitted]
    return NameConstraintSet((x509.NameConstraints(found or None, excluded or None),))


def names(*texts: str) -> Names:
    by_kind: dict[str, list[str]] = {"dns": [], "uri": [], "ip": [], "email": []}
    for text in texts:
        kind, _, name = text.partition(":")
        by_kind[kind].append(name)
    return Names.of(
        map(DNSName.parse, by_kind["dns"]),
        map(URI.parse, by_kind["uri"]),
        map(IPAddress.parse, by_kind["ip"]),
        map(EmailAddress.parse, by_kind["email"]),
    )


INSIDE = {
    "dns:a.test": ["dns:a.test", "dns:x.y.a.test", "dns:*.a.test"],
    "uri:a.test": ["uri:spiffe://a.test/x", "uri:https://a.test"],
    "uri:.a.test": ["uri:https://x.a.test/y", "uri:https://x.y.a.test"],
    "ip:10.0.0.0/8": ["ip:10.255.0.1"],
    "ip:fd00::/8": ["ip:fd00::1"],
    "email:a.test": ["email:x@a.test"],
    "email:.a.test": ["email:x@b.a.test"],
    "email:x@a.test": ["email:x@a.test"],
}
OUTSIDE = {
    "dns:a.test": ["dns:b.test", "dns:xa.test", "dns:test", "dns:*.b.test"],
    "uri:a.test": [
        "uri:spiffe://b.test/x",
        "uri:https://x.a.test",
        "uri:https://b.test/a.test",
        "uri:https://10.0.0.1",
    ],
    "uri:.a.test": ["uri:https://a.test", "uri:https://xa.test"],
    "ip:10.0.0.0/8": ["ip:11.0.0.1", "ip:fd00::1"],
    "ip:fd00::/8": ["ip:10.0.0.1", "ip:fe80::1"],
    "email:a.test": ["email:x@b.a.test", "email:x@b.test"],
    "email:.a.test": ["email:x@a.test"],
    "email:x@a.test": ["email:y@a.test", "email:X@a.test", "email:x@b.test"],
}


@pytest.mark.parametrize("constraint", INSIDE)
def test_names_inside_pass(constraint: str) -> None:
    """And those of all other kinds, which are not constrained by it."""
    assert bounds((constraint,)).violations(names(*INSIDE[constraint])) == []
    others = [
        name for kind in INSIDE for name in INSIDE[kind] if name.partition(":")[0] != constraint.partition(":")[0]
    ]
    assert bounds((constraint,)).violations(names(*others)) == []


@pytest.mark.parametrize("constraint", OUTSIDE)
def test_each_name_outside_is_told_with_what_is_permitted(constraint: str) -> None:
    """All at once."""
    outside = OUTSIDE[constraint]
    words = f"the CA's certificate permits {constraint} only"
    assert bounds((constraint,)).violations(names(*outside)) == [(name.partition(":")[2], words) for name in outside]


def test_each_certificate_of_a_chain_counts() -> None:
    """A name must pass all of them."""
    both = NameConstraintSet((*bounds(("dns:test",)).constraints, *bounds(("dns:a.test", "dns:b.test")).constraints))
    assert both.violations(names("dns:x.a.test", "dns:b.test")) == []
    assert both.violations(names("dns:c.test")) == [("c.test", "the CA's certificate permits dns:a.test, dns:b.test only")]


EXCLUDED = {
    "dns:b.a.test": (x509.DNSName("b.a.test"), True),
    "dns:a.test": (x509.DNSName("b.a.test"), False),
    "dns:*.a.test": (x509.DNSName("b.a.test"), True),
    "dns:*.test.org": (x509.DNSName("b.a.test"), False),
    "dns:x.test": (x509.DNSName(""), True),
    "uri:https://b.a.test": (x509.UniformResourceIdentifier("a.test"), True),
    "uri:https://10.0.0.1": (x509.UniformResourceIdentifier("a.test"), True),
    "uri:https://b.test": (x509.UniformResourceIdentifier("a.test"), False),
    "email:x@b.a.test": (x509.RFC822Name("a.test"), True),
    "ip:10.0.0.1": (x509.IPAddress(ipaddress.ip_network("10.0.0.0/8")), True),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_what_is_excluded_is_refused_also_where_verifiers_differ(name: str) -> None:
    """A wildcard that covers an excluded name, or hosts below an excluded one, are refused by some."""
    tree, refused = EXCLUDED[name]
    problem = f"the CA's certificate excludes {format_constraint(tree)}"
    assert bounds(excluded=(tree,)).violations(names(name)) == ([(name.partition(":")[2], problem)] if refused else [])


def test_constraints_are_found_in_certificates() -> None:
    """In all of a chain, the root's among them."""
    one, other = (x509.NameConstraints([x509.DNSName(name)], None) for name in ("test", "a.test"))
    root = pki.authority("root", extensions=[pki.CA_USAGE, one])
    middle = pki.authority("middle", root, extensions=[pki.CA_USAGE, other])
    lower = pki.authority("lower", middle)
    chain = [signer.certificate for signer in (lower, middle, root)]
    assert NameConstraintSet.of(chain) == NameConstraintSet((other, one))
    assert NameConstraintSet.of(chain[:1]).violations(names("dns:b.test")) == []


def test_directory_names_bind_subjects_only() -> None:
    """So a certificate with an empty subject passes; kinds that never stand in our certificates are unknown."""
    directory = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example")]))
    assert format_constraint(directory) == "directory:O=Example"
    found = bounds(excluded=(directory,))
    assert found.constrains_subjects
    assert found.violations(names("dns:a.test")) == []
    assert not bounds(("dns:a.test",)).constrains_subjects
    other = x509.RegisteredID(ObjectIdentifier("1.2.3"))
    assert unsupported_kinds(x509.NameConstraints([directory, other], None)) == ["RegisteredID"]
