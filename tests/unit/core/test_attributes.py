"""Volume attributes: parsing, and errors with all faults."""

from __future__ import annotations

import itertools
import re
import subprocess
from datetime import timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from csi_driver.core.attribute_hints import _BY_KEY, _HINTS
from csi_driver.core.attributes import ATTRIBUTES, CertificateSpec, IssuanceOptions, parse_attributes
from csi_driver.core.certificates.csr import MAX_CSR_BYTES, build_csr, parse_csr
from csi_driver.core.certificates.keys import key_type_of
from csi_driver.core.durations import parse_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import IPAddress, Names
from csi_driver.core.spec import MAX_NAMES, MAX_NAMES_BYTES, MIN_DURATION, KeyType, Usage
from tests.support.hostile_csrs import internationalized_names
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
        "reuse-key": st.sampled_from(["true", "false"]),
        "common-name": st.sampled_from(["shop", "Billing Service"]),
        "subject": st.sampled_from(["O=Example,OU=Shop", "C=DE", "O=Example\\, Inc."]),
        "reload": st.sampled_from(["signal=HUP,process=nginx"]),
        "spiffe": st.sampled_from(["true", "false"]),
        "fs-group": st.integers(0, 2**31 - 1).map(str),
        "files": st.sampled_from(["autocert", "kubernetes", "credential-bundle", "haproxy", "postgres"]),
        "key-file": st.sampled_from(["server.key", "k", "_"]),
        "truststore-file": st.sampled_from(["trust.p12"]),
        "uid": st.integers(0, 2**31 - 1).map(str),
        "key-mode": st.sampled_from(["0400", "0440", "0600", "0640"]),
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
    with pytest.raises(CertmountError, match=r"^InvalidAttributes: ") as raised:
        parse_attributes(attributes)
    faults = [fault for fault in raised.value.faults if isinstance(fault, Fault)]
    return {fault.field.removeprefix("volumeAttributes."): f"{fault.problem}; {fault.hint}" for fault in faults}


def items_of(attributes: dict[str, str], key: str) -> list[str]:
    return attributes[key].split(",") if key in attributes else []


def test_no_attributes_are_valid() -> None:
    assert parse_attributes({}) == CertificateSpec()
    assert CertificateSpec().key_type is KeyType.EC_P256


@given(good)
def test_valid_attributes_set_their_fields(attributes: dict[str, str]) -> None:
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
    assert spec.spiffe == (attributes.get("spiffe") != "false")
    assert spec.reuse_key == (attributes.get("reuse-key") == "true")
    written = [f"CN={attributes['common-name']}"] if "common-name" in attributes else []
    written += [attributes["subject"]] if "subject" in attributes else []
    assert str(spec.subject) == ",".join(written)
    assert spec.fs_group == (int(attributes["fs-group"]) if "fs-group" in attributes else None)


def test_examples_of_the_documentation_are_valid() -> None:
    for attribute in ATTRIBUTES:
        others = {"files": "java"} if attribute.name in ("password-file", "pkcs12-encryption") else {}
        parse_attributes({**others, attribute.name: attribute.example})
    options = IssuanceOptions.__dataclass_fields__
    assert [attribute.name for attribute in ATTRIBUTES if attribute.field in options] == [
        "common-name", "subject", "duration", "usages", "issuer", "federations", "spiffe",
    ]  # fmt: skip


def test_values_at_the_limits_are_valid() -> None:
    hosts = ",".join(f"n{number}.example" for number in range(MAX_NAMES))
    spec = parse_attributes({"duration": "10s", "renew-before": "9.999s", "fs-group": "2147483647", "dns-names": hosts})
    assert (spec.duration, spec.fs_group, len(spec.names)) == (MIN_DURATION, 2**31 - 1, MAX_NAMES)


@given(any_attributes)
@example({"name": "\ud800", "\ud800": "", "fs-group": "²", "duration": "٣h"})
def test_any_attributes_are_valid_or_raise_invalid_attributes(attributes: dict[str, str]) -> None:
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
        before = spec.renew_before if isinstance(spec.renew_before, timedelta) else timedelta.resolution
        assert timedelta() < before < (spec.duration or timedelta.max)


@given(
    good,
    st.dictionaries(
        st.sampled_from([*KNOWN, "nmae"]),
        st.sampled_from(["", " ", "\x00", "-1\n", "a b\x7f", "\u202e"]),
        min_size=1,
        max_size=18,
    ),
)
def test_all_faults_are_reported_together(attributes: dict[str, str], wrong: dict[str, str]) -> None:
    assert set(faults_of({**attributes, **wrong})) == set(wrong)


CONTRADICTIONS = [
    ("key-encoding", {"key-type": "RSA-2048", "key-encoding": "sec1"}),
    ("password-file", {"password-file": "p"}),
    ("pkcs12-encryption", {"pkcs12-encryption": "legacy"}),
    ("gid", {"gid": "1", "fs-group": "1"}),
    ("common-name", {"common-name": "a", "subject": "CN=b,O=Example"}),
    ("renew-before", {"duration": "1h", "renew-before": "1h"}),
    ("key-file", {"key-file": "site.crt"}),
    ("certificate-der-file", {"certificate-der-file": "generation.json"}),
    ("ip-sans", {"ip-sans": ",".join(f"10.0.0.{number}" for number in range(60)), "dns-names": ",".join(f"n{number}.example" for number in range(50))}),
    ("nmae", {"nmae": "a.example"}),
    ("uid", {"uid": "root"}),
]  # fmt: skip
"""A faulty field, and attributes that each are valid for themselves, or not."""


@given(st.lists(st.sampled_from(CONTRADICTIONS), min_size=1, unique_by=lambda row: row[0]))
def test_all_contradictions_are_reported_together(rows: list[tuple[str, dict[str, str]]]) -> None:
    attributes = {name: value for _, row in rows for name, value in row.items()}
    assert set(faults_of(attributes)) == {field for field, _ in rows}


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("nmae", "a.example", "did you mean name?"),
        ("Name", "a.example", "did you mean name?"),
        ("dnsNames", "a.example", "did you mean dns-names?"),
        ("DNS_NAMES", "a.example", "did you mean dns-names?"),
        ("uri_sans", "x", "did you mean uri-sans?"),
        ("durations", "1h", "did you mean duration?"),
        ("renewBefore", "1h", "did you mean renew-before?"),
        ("keyType", "RSA-2048", "did you mean key-type?"),
        ("fsGroup", "1", "did you mean fs-group?"),
        ("cert-manager.io/dns-names", "x", "did you mean dns-names?"),
        ("cert-manager.io/common-name", "a", "is unknown; did you mean common-name?"),
        ("CN", "a", "is unknown; use common-name"),
        ("is-ca", "true", "is unknown; certmount never issues CA certificates; remove it"),
        ("isCA", "true", "is unknown; certmount never issues CA certificates; remove it"),
        ("cert-manager.io/subject-countries", "x", "is unknown; use subject, for example O=Example,OU=Shop"),
        ("autocert.step.sm/sans", "a", "use name and dns-names, ip-sans, uri-sans or"),
        ("autocert.step.sm/owner", "a", "use uid and gid for the owner of the key"),
        ("autocert.step.sm/mode", "a", "use key-mode for the mode of the key"),
        ("key-mode", "0644", "'0644' gives other users access to the key; use 0400, 0440, 0600 or 0640"),
        ("key-mode", "444", "'444' gives other users access to the key"),
        ("key-mode", "0000", "'0000' is not a mode for a key; use 0400, 0440, 0600 or 0640"),
        ("key-mode", "rw", "'rw' is not a mode for a key"),
        ("uid", "postgres", "'postgres' is not a user ID; use a whole number from 0 to 2147483647"),
        ("issuer-kind", "ClusterIssuer", "is unknown; issuer identifies the issuer by its name alone"),
        ("maxExpirationSeconds", "3600", "is unknown; use duration"),
        ("credentialBundlePath", "x", "is unknown; use bundle-file"),
        ("spiffe.csi.cert-manager.io/privatekey-file", "x", "is unknown; use key-file"),
        ("pkcs12-enable", "true", "use keystore-file or truststore-file for PKCS#12, or files: java"),
        ("pkcs12-password", "x", "set nodePublishSecretRef to a Secret with the key password"),
        (
            "files",
            "nginx",
            "'nginx' is not a set of files; use one of autocert, kubernetes, credential-bundle, haproxy",
        ),
        ("key-file", "../site.key", "'../site.key' is not a file name; use at most 100 letters, digits"),
        ("key-file", "..data", "'..data' is not a file name"),
        ("key-file", "-k", "'-k' is not a file name; use at most 100 letters, digits, '.', '_' and '-', the first not"),
        ("key-file", "site.crt", "'site.crt' is also the name of certificate-file; use another name"),
        ("certificate-file", "generation.json", "is also the name of the summary that each volume has"),
        ("password-file", "p", "is set, but no file has a password; set keystore-file or truststore-file"),
        ("pkcs12-encryption", "legacy", "is set, but the volume has no key store or trust store; set files: java"),
        ("pkcs12-encryption", "aes", "'aes' is not an encryption; use modern or legacy"),
        ("reuse-private-key", "true", "is unknown; use reuse-key"),
        ("spiffeId", "x", "every certificate contains the SPIFFE ID of the pod's service account"),
        ("spiffe", "no", '\'no\' is not "true" or "false"'),
        (
            "zzzz",
            "1",
            "known attributes: name, dns-names, uri-sans, ip-sans, email-sans, common-name, subject, duration, renew-before, key-type, reuse-key, usages, issuer",
        ),
        ("", "1", "known attributes"),
        ("name", "", "is empty; set a value or omit the attribute"),
        ("name", "\t", "is empty"),
        ("name", "bücher.example", r"'b\xfccher.example' has non-ASCII characters; use"),
        ("name", "a\x1b[31m.example", r"'a\x1b[31m.example' has the label"),
        ("name", "*.com", "'*.com' is a wildcard for a top-level domain"),
        ("name", "a" * 5000, "5000 characters long"),
        ("name", "a" * 40_000, "40000 characters long; use at most"),
        ("dns-names", "a.example,", "'' is empty"),
        ("dns-names", ",".join(f"n{n}.example" for n in range(1000)), "has 1000 names; use at most 100"),
        (
            "dns-names",
            ",".join(internationalized_names(60)),
            "has more than 4096 characters of different xn-- labels; use fewer names",
        ),
        ("uri-sans", "a.example", "'a.example' is not a URI"),
        ("duration", "-5m", "'-5m' is negative; use a positive duration, such as 1h30m"),
        ("duration", "0s", "is 0s; use at least 10s"),
        ("duration", "1d", "'1d' is not a duration; use numbers with the units h, m or s"),
        ("duration", "999999999h", "longer than 100 years"),
        ("renew-before", "0s", "is zero"),
        ("renew-before", "-1h", "'-1h' is negative"),
        ("ip-sans", "10.0.0.256", "'10.0.0.256' is not an IP address, such as 10.0.0.1 or fd00::1"),
        ("ip-sans", "10.0.0.0/8", "'10.0.0.0/8' is not an IP address"),
        ("ip-sans", "::ffff:10.0.0.1", "is an IPv4-mapped IPv6 address; use 10.0.0.1"),
        ("ipSans", "10.0.0.1", "did you mean ip-sans?"),
        ("email-sans", "shop", "'shop' is not an email address of the form name@domain"),
        ("email-sans", "a@b.example,*@b.example", "'*@b.example' is not an email address"),
        ("emails", "a@b.example", "use email-sans"),
        ("usages", "both", "'both' is not a usage; use server, client, or both separated by a comma"),
        ("usages", "server,", "'' is not a usage"),
        ("usage", "server", "use usages with server, client or both"),
        ("issuer", "Let's Encrypt", "is not a name; use 1 to 63 lower-case letters"),
        ("issuer", "a,b", "'a,b' is not a name"),
        ("federations", "a,,b", "'' is not a name"),
        ("federations", ",".join("abcdefghijk"), "has 11 root sets; use at most 10"),
        ("renew-before", "100%", "'100%' is not a part of the lifetime; use 1% to 99%"),
        ("renew-before", "0%", "is not a part of the lifetime"),
        ("renew-before", "5.5%", "is not a duration"),
        ("key-encoding", "der", "'der' is not an encoding of keys; use pkcs8, pkcs1 for RSA keys, or sec1 for EC keys"),
        ("key-encoding", "pkcs1", "'pkcs1' is not an encoding of EC-P256 keys; use pkcs8, or another key-type"),
        ("key-type", "RSA-1024", "use one of EC-P256, EC-P384, EC-P521, RSA-2048, RSA-3072, RSA-4096, Ed25519"),
        ("fs-group", "staff", "use a whole number from 0 to 2147483647"),
        ("fs-group", "2147483648", "is not a group ID"),
        ("fs-group", "+1", "is not a group ID"),
        ("fs-group", "١", "is not a group ID"),
    ],
)
def test_fault_has_problem_and_hint(field: str, value: str, words: str) -> None:
    faults = faults_of({field: value})
    assert list(faults) == [field]
    assert words in faults[field]


@pytest.mark.parametrize(
    "attributes, field, words",
    [
        ({"a\nb": "1"}, r"a\nb", "known attributes"),
        ({"duration": "1h", "renew-before": "1h"}, "renew-before", "1h is not shorter than the certificate's lifetime"),
        ({"duration": "1h", "renew-before": "2h"}, "renew-before", "lifetime of 1h; omit it to renew after two thirds"),
        (
            {"files": "java", "key-type": "ML-DSA-65"},
            "key-type",
            "ML-DSA-65 keys cannot be in PKCS#12; omit keystore-file",
        ),
        ({"gid": "1", "fs-group": "1"}, "gid", "is set together with fs-group, which means the same; set one of them"),
        ({"files": "kubernetes", "bundle-file": "tls.key"}, "bundle-file", "'tls.key' is also the name of key-file"),
    ],
)
def test_fault_of_several_attributes_has_problem_and_hint(attributes: dict[str, str], field: str, words: str) -> None:
    faults = faults_of(attributes)
    assert list(faults) == [field]
    assert words in faults[field]


def test_hints_name_attributes_that_exist() -> None:
    for hint in _HINTS:
        if advised := re.match(r"use ([a-z-]+)", hint):
            assert advised[1] in KNOWN
    assert not set(_BY_KEY) & set(KNOWN)


def test_total_number_of_names_is_limited() -> None:
    hosts = ",".join(f"n{number}.example" for number in range(60))
    uris = ",".join(f"https://n{number}.example" for number in range(MAX_NAMES))
    assert "160 names in total" in faults_of({"dns-names": hosts, "uri-sans": uris})["uri-sans"]
    hosts = ",".join(f"n{number}.example" for number in range(MAX_NAMES))
    assert "101 names in total" in faults_of({"name": "a.example", "dns-names": hosts})["dns-names"]
    assert "101 names in total" in faults_of({"name": "a.example", "uri-sans": uris})["uri-sans"]
    ips = ",".join(f"10.0.0.{number}" for number in range(61))
    assert "121 names in total" in faults_of({"dns-names": hosts.rpartition(",n60.")[0], "ip-sans": ips})["ip-sans"]


def test_internationalized_labels_are_limited_with_the_values_of_variables() -> None:
    """The authority would reject them too, with an error about the CSR."""
    hosts = ",".join(f"xn--{number:02}${{POD_NAME}}.xn--a{number:02}${{POD_NAME}}.example" for number in range(99))
    with pytest.raises(CertmountError, match="dns-names: has more than 4096 characters of different xn-- labels"):
        parse_attributes({"dns-names": hosts}, {"POD_NAME": "bcher-kva" * 5})


_URIS_WITH_VARIABLES = ",".join(f"https://example.com/{number:02}/{'${POD_NAME}' * 4}" for number in range(MAX_NAMES))


@pytest.mark.parametrize("key_type", KeyType, ids=lambda key_type: key_type.value)
def test_total_size_of_names_is_limited_to_what_fits_into_a_csr(key_type: KeyType) -> None:
    longest = MAX_NAMES_BYTES // MAX_NAMES - len("https://example.com/00/")
    attributes = {"uri-sans": _URIS_WITH_VARIABLES, "key-type": key_type.value}
    largest = parse_attributes(attributes, {"POD_NAME": "a" * (longest // 4)}).names
    assert sum(len(name.text) for name in largest) > MAX_NAMES_BYTES - 4 * MAX_NAMES
    assert len(build_csr(key_of(key_type), largest)) <= MAX_CSR_BYTES
    with pytest.raises(CertmountError) as caught:
        parse_attributes(attributes, {"POD_NAME": "a" * (longest // 4 + 1)})
    assert f"bytes of names in total; a certificate has at most {MAX_NAMES_BYTES}" in str(caught.value)


def test_number_of_reported_faults_is_limited() -> None:
    with pytest.raises(CertmountError) as raised:
        parse_attributes({f"unknown{number}": "" for number in range(1000)})
    assert str(raised.value).endswith("(21) and 980 more faults")
    assert len(str(raised.value)) < 4000
    twenty = str(outcome(lambda: parse_attributes({f"unknown{number}": "" for number in range(20)}), CertmountError))
    assert "(20) volumeAttributes.unknown9" in twenty
    assert "more faults" not in twenty


def openssl_names(names: Names) -> str:
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
