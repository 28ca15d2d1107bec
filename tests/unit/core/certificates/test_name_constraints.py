"""Name constraints: parsing, and which names they permit. tests/peers shows that verifiers agree."""

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
from csi_driver.core.names import InvalidName, Names
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
def test_formatted_constraint_can_be_parsed_again(text: str) -> None:
    constraint = parse_constraint(text)
    assert constraint == GOOD[text]
    assert parse_constraint(format_constraint(constraint)) == constraint


BAD = {
    "": "is not a name constraint; use dns:example.com",
    "example.com": "is not a name constraint",
    "host:example.com": "is not a name constraint",
    "dns:": "permits nothing",
    "dns:.example.com": "starts with a dot",
    "dns:*.example.com": "has a wildcard",
    "dns:a..b": "has the label",
    "uri:https://example.com": "contains more than a host",
    "uri:example.com/path": "contains more than a host",
    "uri:*.example.com": "is not a trust domain",
    "ip:10.0.0.1/8": "has host bits set",
    "ip:ten": "is not a range of IP addresses",
    "email:a@": "has a domain that is empty",
    "email:a b@example.com": "is not an email address",
    "email:*.example.com": "has a wildcard",
}


@pytest.mark.parametrize("text", BAD)
def test_invalid_constraint_is_rejected_with_a_reason(text: str) -> None:
    with pytest.raises(InvalidName) as refusal:
        parse_constraint(text)
    assert BAD[text] in str(refusal.value)


@given(st.builds("{}:{}".format, st.sampled_from(["dns", "uri", "ip", "email", "x"]), strategies.hostile_texts))
def test_any_text_is_a_valid_constraint_or_rejected(text: str) -> None:
    try:
        constraint = parse_constraint(text)
    except InvalidName:
        return
    x509.NameConstraints([constraint], None).public_bytes()


def bounds(permitted: tuple[str, ...] = (), excluded: tuple[x509.GeneralName, ...] = ()) -> NameConstraintSet:
    found = [parse_constraint(text) for text in permitted]
    return NameConstraintSet((x509.NameConstraints(found or None, excluded or None),))


def names(*texts: str) -> Names:
    return pki.names(*(text.partition(":")[2] for text in texts))


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
    "uri:a.test": ["uri:spiffe://b.test", "uri:https://x.a.test", "uri:https://b.test/a.test", "uri:https://10.0.0.1"],
    "uri:.a.test": ["uri:https://a.test", "uri:https://xa.test"],
    "ip:10.0.0.0/8": ["ip:11.0.0.1", "ip:fd00::1"],
    "ip:fd00::/8": ["ip:10.0.0.1", "ip:fe80::1"],
    "email:a.test": ["email:x@b.a.test", "email:x@b.test"],
    "email:.a.test": ["email:x@a.test"],
    "email:x@a.test": ["email:y@a.test", "email:X@a.test", "email:x@b.test"],
}


@pytest.mark.parametrize("constraint", INSIDE)
def test_names_inside_a_subtree_are_permitted(constraint: str) -> None:
    assert bounds((constraint,)).violations(names(*INSIDE[constraint])) == []
    kind = constraint.partition(":")[0]
    others = [name for inside in INSIDE.values() for name in inside if not name.startswith(f"{kind}:")]
    assert bounds((constraint,)).violations(names(*others)) == []


@pytest.mark.parametrize("constraint", OUTSIDE)
def test_each_name_outside_is_a_violation(constraint: str) -> None:
    outside = OUTSIDE[constraint]
    words = f"the CA's certificate permits only {constraint}"
    assert bounds((constraint,)).violations(names(*outside)) == [(name.partition(":")[2], words) for name in outside]


@pytest.mark.parametrize("constraint", INSIDE)
def test_uri_with_an_ip_address_is_a_violation_of_any_constraint(constraint: str) -> None:
    excluded = bounds(excluded=(parse_constraint(constraint),))
    for found in (bounds((constraint,)), excluded):
        assert [name for name, _ in found.violations(names("uri:https://192.0.2.1/x"))] == ["https://192.0.2.1/x"]


def test_constraints_of_all_certificates_in_a_chain_apply() -> None:
    both = NameConstraintSet((*bounds(("dns:test",)).constraints, *bounds(("dns:a.test", "dns:b.test")).constraints))
    assert both.violations(names("dns:x.a.test", "dns:b.test")) == []
    problem = "the CA's certificate permits only dns:a.test, dns:b.test"
    assert both.violations(names("dns:c.test")) == [("c.test", problem)]


EXCLUDED = {
    "dns:b.a.test": (x509.DNSName("b.a.test"), True),
    "dns:a.test": (x509.DNSName("b.a.test"), False),
    "dns:*.a.test": (x509.DNSName("b.a.test"), True),
    "dns:*.test.org": (x509.DNSName("b.a.test"), False),
    "dns:x.test": (x509.DNSName(""), True),
    "uri:https://b.a.test": (x509.UniformResourceIdentifier("a.test"), True),
    "uri:https://b.test": (x509.UniformResourceIdentifier("a.test"), False),
    "email:x@b.a.test": (x509.RFC822Name("a.test"), True),
    "ip:10.0.0.1": (x509.IPAddress(ipaddress.ip_network("10.0.0.0/8")), True),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_excluded_names_are_violations_even_if_only_some_verifiers_agree(name: str) -> None:
    """Some reject a wildcard that covers an excluded name, or hosts below an excluded one."""
    tree, refused = EXCLUDED[name]
    problem = f"the CA's certificate excludes {format_constraint(tree)}"
    assert bounds(excluded=(tree,)).violations(names(name)) == ([(name.partition(":")[2], problem)] if refused else [])


def test_constraints_are_collected_from_the_whole_chain() -> None:
    one, other = (x509.NameConstraints([x509.DNSName(name)], None) for name in ("test", "a.test"))
    root = pki.authority("root", extensions=[pki.CA_USAGE, one])
    middle = pki.authority("middle", root, extensions=[pki.CA_USAGE, other])
    lower = pki.authority("lower", middle)
    chain = [signer.certificate for signer in (lower, middle, root)]
    assert NameConstraintSet.of(chain) == NameConstraintSet((other, one))
    assert NameConstraintSet.of(chain[:1]).violations(names("dns:b.test")) == []


def test_directory_names_constrain_only_subjects() -> None:
    directory = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example")]))
    assert format_constraint(directory) == "directory:O=Example"
    found = bounds(excluded=(directory,))
    assert found.constrains_subjects
    assert found.violations(names("dns:a.test")) == []
    assert not bounds(("dns:a.test",)).constrains_subjects
    other = x509.RegisteredID(ObjectIdentifier("1.2.3"))
    assert unsupported_kinds(x509.NameConstraints([directory, other], None)) == ["RegisteredID"]
