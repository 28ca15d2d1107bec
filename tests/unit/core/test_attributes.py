"""Volume attributes: parsing, and errors with all faults."""

from __future__ import annotations

import itertools
import subprocess
from datetime import timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from csi_driver.core.attributes import ATTRIBUTES, CertificateSpec, parse_attributes
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.keys import key_type_of
from csi_driver.core.durations import parse_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import IPAddress, Names
from csi_driver.core.spec import MAX_NAMES, MIN_DURATION, KeyType, Usage
from tests.support.requirements import require_program
from tests.unit.core import strategies
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import LARGEST_DNS, LARGEST_URIS, key_of

KNOWN = tuple(attribute.name for attribute in ATTRIBUTES)

good = st.fixed_dictionaries(
    {},
    optional={
        "name": strategies.dns_texts,
        "dns-names": strategies.fields(strategies.dns_texts),
        "uri-sans": strategies.fields(strategies.uri_texts),
        "ip-sans": strategies.fields(strategies.ip_texts),
        "email-sans": strategies.fields(strategies.email_texts),
        "usages": st.sampled_from(["server", "client", "client,server"]),
        "issuer": strategies.words,
        "federations": strategies.fields(strategies.words),
        "duration": st.integers(10, 5000).map("{}s".format),
        "renew-before": st.integers(1, 9).map("{}s".format),
        "key-type": st.sampled_from([kind.value for kind in KeyType] + ["ec-p256", "rsa-2048"]),
        "fs-group": st.integers(0, 2**31 - 1).map(str),
    },
)
values = st.one_of(
    strategies.hostile_texts,
    strategies.fields(strategies.hostile_texts, strategies.dns_texts, strategies.uri_texts),
    strategies.duration_texts,
)
any_attributes = st.one_of(
    st.dictionaries(st.sampled_from(KNOWN), values),
    st.dictionaries(st.one_of(st.sampled_from([*KNOWN, "Name", "dnsNames", "sans"]), strategies.hostile_texts), values),
    st.builds(lambda one, other: {**one, **other}, good, st.dictionaries(st.sampled_from(KNOWN), values, max_size=2)),
)


def faults_of(attributes: dict[str, str]) -> dict[str, str]:
    """Return the problem and hint of each invalid field."""
    with pytest.raises(CertmountError) as raised:
        parse_attributes(attributes)
    assert raised.value.reason is Reason.INVALID_ATTRIBUTES
    faults = [fault for fault in raised.value.faults if isinstance(fault, Fault)]
    return {fault.field.removeprefix("volumeAttributes."): f"{fault.problem}; {fault.hint}" for fault in faults}


def items_of(attributes: dict[str, str], key: str) -> list[str]:
    return attributes[key].split(",") if key in attributes else []


def test_no_attributes_are_valid() -> None:
    assert parse_attributes({}) == CertificateSpec()
    assert CertificateSpec().key_type is KeyType.EC_P256


@given(good)
def test_valid_attributes_set_their_fields(attributes: dict[str, str]) -> None:
    """Names and lists keep their order without duplicates; the attribute name comes first."""
    spec = parse_attributes(attributes)
    dns = [attributes[key].split(",") for key in ("name", "dns-names") if key in attributes]
    assert [name.text for name in spec.names.dns] == list(dict.fromkeys(itertools.chain(*dns)))
    uris = attributes["uri-sans"].split(",") if "uri-sans" in attributes else []
    assert [uri.text for uri in spec.names.uris] == list(dict.fromkeys(uris))
    assert [ip.text for ip in spec.names.ips] == list(dict.fromkeys(items_of(attributes, "ip-sans")))
    assert [email.text for email in spec.names.emails] == list(dict.fromkeys(items_of(attributes, "email-sans")))
    assert {usage.value for usage in spec.usages} == set(items_of(attributes, "usages"))
    assert spec.usages in ((), (Usage.SERVER,), (Usage.CLIENT,), (Usage.SERVER, Usage.CLIENT))
    assert spec.issuer == attributes.get("issuer", "internal")
    assert list(spec.federations) == list(dict.fromkeys(items_of(attributes, "federations")))
    for key, value in (("duration", spec.duration), ("renew-before", spec.renew_before)):
        assert value == (parse_duration(attributes[key]) if key in attributes else None)
    assert spec.key_type.value.lower() == attributes.get("key-type", "EC-P256").lower()
    assert spec.fs_group == (int(attributes["fs-group"]) if "fs-group" in attributes else None)


def test_examples_of_the_documentation_are_valid() -> None:
    """docs/volume-attributes.md contains them."""
    for attribute in ATTRIBUTES:
        parse_attributes({attribute.name: attribute.example})
    assert [attribute.name for attribute in ATTRIBUTES if attribute.reaches_ca] == [
        "duration", "usages", "issuer", "federations",
    ]  # fmt: skip


def test_values_at_the_limits_are_valid() -> None:
    hosts = ",".join(f"n{number}.example" for number in range(MAX_NAMES))
    spec = parse_attributes({"duration": "10s", "renew-before": "9.999s", "fs-group": "2147483647", "dns-names": hosts})
    assert (spec.duration, spec.fs_group, len(spec.names)) == (MIN_DURATION, 2**31 - 1, MAX_NAMES)


@given(any_attributes)
@example({"name": "\ud800", "\ud800": "", "fs-group": "²", "duration": "٣h"})
def test_any_attributes_are_valid_or_raise_invalid_attributes(attributes: dict[str, str]) -> None:
    """The error is one printable line."""
    spec = outcome(lambda: parse_attributes(attributes), CertmountError)
    if isinstance(spec, CertmountError):
        assert spec.reason is Reason.INVALID_ATTRIBUTES
        assert not spec.retryable
        assert spec.faults
        assert str(spec).isascii()
        assert str(spec).isprintable()
        assert len(str(spec)) < 10_000
    else:
        assert set(attributes) <= set(KNOWN)
        assert len(spec.names) <= MAX_NAMES
        assert spec.duration is None or spec.duration >= MIN_DURATION
        assert spec.renew_before is None or spec.renew_before > timedelta()
        assert (spec.renew_before or timedelta()) < (spec.duration or timedelta.max)


@given(
    good,
    st.dictionaries(
        st.sampled_from([*KNOWN, "nmae"]),
        st.sampled_from(["", " ", "\x00", "-1", "a b", "ü"]),
        min_size=1,
    ),
)
def test_all_faults_are_reported_together(attributes: dict[str, str], wrong: dict[str, str]) -> None:
    assert set(faults_of({**attributes, **wrong})) == set(wrong)


@pytest.mark.parametrize(
    "attributes, field, words",
    [
        ({"nmae": "a.example"}, "nmae", "did you mean name?"),
        ({"Name": "a.example"}, "Name", "did you mean name?"),
        ({"dnsNames": "a.example"}, "dnsNames", "did you mean dns-names?"),
        ({"DNS_NAMES": "a.example"}, "DNS_NAMES", "did you mean dns-names?"),
        ({"uri_sans": "x"}, "uri_sans", "did you mean uri-sans?"),
        ({"durations": "1h"}, "durations", "did you mean duration?"),
        ({"renewBefore": "1h"}, "renewBefore", "did you mean renew-before?"),
        ({"keyType": "RSA-2048"}, "keyType", "did you mean key-type?"),
        ({"fsGroup": "1"}, "fsGroup", "did you mean fs-group?"),
        ({"csi.cert-manager.io/dns-names": "x"}, "csi.cert-manager.io/dns-names", "did you mean dns-names?"),
        (
            {"zzzz": "1"},
            "zzzz",
            "known attributes: name, dns-names, uri-sans, ip-sans, email-sans, duration, renew-before, key-type, usages, issuer",
        ),
        ({"": "1"}, "", "known attributes"),
        ({"a\nb": "1"}, r"a\nb", "known attributes"),
        ({"name": ""}, "name", "is empty; set a value or omit the attribute"),
        ({"name": "\t"}, "name", "is empty"),
        ({"name": "bücher.example"}, "name", r"'b\xfccher.example' has non-ASCII characters; use"),
        ({"name": "a\x1b[31m.example"}, "name", r"'a\x1b[31m.example' has the label"),
        ({"name": "*.com"}, "name", "'*.com' is a wildcard for a top-level domain"),
        ({"name": "a" * 5000}, "name", "5000 characters long"),
        ({"name": "a" * 40_000}, "name", "40000 characters long; use at most"),
        ({"dns-names": "a.example,"}, "dns-names", "'' is empty"),
        ({"dns-names": ",".join(f"n{n}.example" for n in range(1000))}, "dns-names", "has 1000 names; use at most 100"),
        ({"uri-sans": "a.example"}, "uri-sans", "'a.example' is not a URI"),
        ({"duration": "-5m"}, "duration", "'-5m' is negative; use a positive duration, such as 1h30m"),
        ({"duration": "0s"}, "duration", "is 0s; use at least 10s"),
        ({"duration": "1d"}, "duration", "'1d' is not a duration; use numbers with the units h, m or s"),
        ({"duration": "999999999h"}, "duration", "longer than 100 years"),
        ({"renew-before": "0s"}, "renew-before", "is zero"),
        ({"renew-before": "-1h"}, "renew-before", "'-1h' is negative"),
        ({"duration": "1h", "renew-before": "1h"}, "renew-before", "1h is not shorter than the certificate's lifetime"),
        ({"duration": "1h", "renew-before": "2h"}, "renew-before", "lifetime of 1h; omit it to renew after two thirds"),
        ({"ip-sans": "10.0.0.256"}, "ip-sans", "'10.0.0.256' is not an IP address, such as 10.0.0.1 or fd00::1"),
        ({"ip-sans": "10.0.0.0/8"}, "ip-sans", "'10.0.0.0/8' is not an IP address"),
        ({"ip-sans": "::ffff:10.0.0.1"}, "ip-sans", "is an IPv4-mapped IPv6 address; use 10.0.0.1"),
        ({"ipSans": "10.0.0.1"}, "ipSans", "did you mean ip-sans?"),
        ({"email-sans": "shop"}, "email-sans", "'shop' is not an email address of the form name@domain"),
        ({"email-sans": "a@b.example,*@b.example"}, "email-sans", "'*@b.example' is not an email address"),
        ({"emails": "a@b.example"}, "emails", "did you mean email-sans?"),
        ({"usages": "both"}, "usages", "'both' is not a usage; use server, client or both"),
        ({"usages": "server,"}, "usages", "'' is not a usage"),
        ({"usage": "server"}, "usage", "did you mean usages?"),
        ({"issuer": "Let's Encrypt"}, "issuer", "is not a name; use 1 to 63 lower-case letters"),
        ({"issuer": "a,b"}, "issuer", "'a,b' is not a name"),
        ({"federations": "a,,b"}, "federations", "'' is not a name"),
        ({"federations": ",".join("abcdefghijk")}, "federations", "has 11 root sets; use at most 10"),
        ({"key-type": "RSA-1024"}, "key-type", "use one of EC-P256, EC-P384, RSA-2048, RSA-3072, RSA-4096, Ed25519"),
        ({"fs-group": "staff"}, "fs-group", "use a whole number from 0 to 2147483647"),
        ({"fs-group": "2147483648"}, "fs-group", "is not a group ID"),
        ({"fs-group": "+1"}, "fs-group", "is not a group ID"),
        ({"fs-group": "١"}, "fs-group", "is not a group ID"),
    ],
)
def test_fault_has_problem_and_hint(attributes: dict[str, str], field: str, words: str) -> None:
    faults = faults_of(attributes)
    assert list(faults) == [field]
    assert words in faults[field]


def test_total_number_of_names_is_limited() -> None:
    """The fault is in the longest list."""
    hosts = ",".join(f"n{number}.example" for number in range(60))
    uris = ",".join(f"https://n{number}.example" for number in range(MAX_NAMES))
    assert "160 names in total" in faults_of({"dns-names": hosts, "uri-sans": uris})["uri-sans"]
    hosts = ",".join(f"n{number}.example" for number in range(MAX_NAMES))
    assert "101 names in total" in faults_of({"name": "a.example", "dns-names": hosts})["dns-names"]
    assert "101 names in total" in faults_of({"name": "a.example", "uri-sans": uris})["uri-sans"]
    ips = ",".join(f"10.0.0.{number}" for number in range(61))
    assert "121 names in total" in faults_of({"dns-names": hosts.rpartition(",n60.")[0], "ip-sans": ips})["ip-sans"]


def test_number_of_reported_faults_is_limited() -> None:
    with pytest.raises(CertmountError) as raised:
        parse_attributes({f"unknown{number}": "" for number in range(1000)})
    assert str(raised.value).endswith("(21) and 980 more faults")
    assert len(str(raised.value)) < 4000
    twenty = str(outcome(lambda: parse_attributes({f"unknown{number}": "" for number in range(20)}), CertmountError))
    assert "(20) volumeAttributes.unknown9" in twenty
    assert "more faults" not in twenty


def openssl_names(names: Names) -> str:
    """Return names in OpenSSL's output format."""
    return ", ".join(
        [
            *(f"DNS:{name}" for name in names.dns),
            *(f"URI:{uri}" for uri in names.uris),
            *(f"IP Address:{_openssl_form(ip)}" for ip in names.ips),
            *(f"email:{email}" for email in names.emails),
        ]
    )


def _openssl_form(ip: IPAddress) -> str:
    address = ip.address
    return ":".join(f"{int(group, 16):X}" for group in address.exploded.split(":")) if address.version == 6 else ip.text


@settings(max_examples=30)
@given(good.map(lambda attributes: {**attributes, "key-type": "EC-P256"}))
@example({"name": "*.example.com", "dns-names": "xn--bcher-kva.example, b.example", "key-type": "RSA-2048"})
@example({"uri-sans": "https://example.com/~a!$&'()*+;=:@", "key-type": "Ed25519"})
@example({"ip-sans": "10.0.0.1, fd00::1", "email-sans": "a.b+c@example.com", "key-type": "EC-P384"})
@example({"name": "a.example", "key-type": "RSA-3072"})
def test_openssl_reads_the_same_names_from_the_csr(attributes: dict[str, str]) -> None:
    openssl = require_program("openssl")
    spec = parse_attributes(attributes)
    der = build_csr(key_of(spec.key_type), spec.names)
    request = parse_csr(der)
    assert request.names == spec.names
    assert key_type_of(request.public_key) is spec.key_type
    command = [openssl, "req", "-inform", "DER", "-verify", "-noout", "-text", "-nameopt", "utf8"]
    printed = subprocess.run(command, input=der, capture_output=True, check=True)
    assert b"verify OK" in printed.stdout + printed.stderr
    lines = [line.strip() for line in printed.stdout.decode().splitlines()]
    if spec.names:
        assert lines[lines.index("X509v3 Subject Alternative Name: critical") + 1] == openssl_names(spec.names)
    else:
        assert not any("Alternative" in line for line in lines)


def test_csr_with_the_most_and_longest_names_is_valid() -> None:
    lists = {"dns-names": ",".join(LARGEST_DNS), "uri-sans": ",".join(LARGEST_URIS)}
    spec = parse_attributes({**lists, "key-type": "RSA-4096"})
    assert len(spec.names) == MAX_NAMES
    assert parse_csr(build_csr(key_of(spec.key_type), spec.names)).names == spec.names
