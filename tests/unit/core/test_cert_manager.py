"""Volumes written for cert-manager's csi-driver."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import ATTRIBUTES, CertificateSpec, parse_attributes
from csi_driver.core.cert_manager import _KNOWN, PREFIX, translate
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.file_format import KeyEncoding
from csi_driver.core.spec import KeyType, Usage
from csi_driver.core.variables import pod_variables

PAGE = Path(__file__).parents[3] / "docs" / "from-cert-manager-csi-driver.md"
VARIABLES = pod_variables(namespace="web", name="shop-0", uid="u", service_account="shop", node="node1")
OWN = {attribute.name for attribute in ATTRIBUTES}


def spec(attributes: Mapping[str, str], **own: str) -> CertificateSpec:
    """Parse attributes without their prefix, together with certmount's own."""
    return parse_attributes({**{PREFIX + key: value for key, value in attributes.items()}, **own}, VARIABLES)


def faults(attributes: Mapping[str, str], **own: str) -> dict[str, str]:
    with pytest.raises(CertmountError) as raised:
        spec(attributes, **own)
    found: dict[str, str] = {}
    for fault in raised.value.faults:
        field, _, text = str(fault).partition(": ")
        found.setdefault(field.removeprefix("volumeAttributes.").removeprefix(PREFIX), text)
    return found


def test_example_of_its_documentation() -> None:
    found = spec(
        {
            "issuer-name": "ca-issuer",
            "dns-names": "${POD_NAME}.${POD_NAMESPACE}.svc.cluster.local,$SERVICE_ACCOUNT_NAME.example.com",
        }
    )
    assert (str(found.names), found.issuer) == ("shop-0.web.svc.cluster.local, shop.example.com", "ca-issuer")
    assert sorted(found.layout.names.values()) == ["ca.crt", "tls.crt", "tls.key"]
    assert found.key_type is KeyType.RSA_2048
    assert found.spiffe


def test_all_attributes_that_have_the_same_meaning() -> None:
    found = spec(
        {
            "issuer-name": "ca", "issuer-kind": "ClusterIssuer", "issuer-group": "cert-manager.io",
            "dns-names": "a.example.com, b.example.com", "ip-sans": "10.0.0.1", "uri-sans": "https://example.com/x",
            "duration": "2h", "renew-before": "30m", "is-ca": "false",
            "key-usages": "digital signature, key encipherment, server auth", "key-algorithm": "ECDSA",
            "key-size": "384", "certificate-file": "a.crt", "privatekey-file": "a.key", "ca-file": "root.crt",
            "fs-group": "1000", "reuse-private-key": "false", "pkcs12-enable": "true", "pkcs12-filename": "a.p12",
        }
    )  # fmt: skip
    assert str(found.names) == "a.example.com, b.example.com, https://example.com/x, 10.0.0.1"
    assert (found.duration, found.renew_before) == (timedelta(hours=2), timedelta(minutes=30))
    assert (found.key_type, found.usages, found.fs_group) == (KeyType.EC_P384, (Usage.SERVER,), 1000)
    assert not found.spiffe
    assert sorted(found.layout.names.values()) == ["a.crt", "a.key", "a.p12", "keystore.password", "root.crt"]


@pytest.mark.parametrize(
    "attributes, key_type",
    [
        ({"key-algorithm": "RSA"}, KeyType.RSA_2048),
        ({"key-size": "4096"}, KeyType.RSA_4096),
        ({"key-algorithm": "ECDSA"}, KeyType.EC_P256),
        ({"key-algorithm": "Ed25519"}, KeyType.ED25519),
        ({"key-algorithm": "ecdsa", "key-size": "521"}, KeyType.EC_P521),
        ({"key-algorithm": "ED25519"}, KeyType.ED25519),
    ],
)
def test_key_type(attributes: dict[str, str], key_type: KeyType) -> None:
    assert spec(attributes).key_type is key_type


def test_parts_of_the_subject() -> None:
    found = spec({"common-name": "shop", "organizations": "Example", "countries": "DE", "dns-names": "a.web.svc"})
    assert (str(found.subject), str(found.names)) == ("CN=shop,O=Example,C=DE", "a.web.svc")
    assert spec({"reuse-private-key": "true"}).reuse_key
    assert str(spec({"literal-subject": "CN=shop,O=A\\, B"}).subject) == "CN=shop,O=A\\, B"


@pytest.mark.parametrize(
    "attributes, encoding",
    [
        ({}, KeyEncoding.PKCS1),
        ({"key-encoding": "PKCS8"}, KeyEncoding.PKCS8),
        ({"key-encoding": "PKCS1"}, KeyEncoding.PKCS1),
        ({"key-algorithm": "ECDSA"}, KeyEncoding.PKCS8),
        ({"key-algorithm": "Ed25519"}, KeyEncoding.PKCS8),
        ({"key-algorithm": "rsa", "key-encoding": "pkcs8"}, KeyEncoding.PKCS8),
        ({"key-algorithm": "RSA", "key-encoding": "Pkcs1"}, KeyEncoding.PKCS1),
    ],
)
def test_key_encoding(attributes: dict[str, str], encoding: KeyEncoding) -> None:
    assert spec({"issuer-name": "ca", **attributes}).layout.options.key_encoding is encoding


def test_key_store_has_the_default_name_of_that_driver() -> None:
    assert spec({"pkcs12-enable": "true"}).layout.names["keystore-file"] == "keystore.p12"


def test_empty_values_count_as_missing() -> None:
    assert spec(dict.fromkeys(_KNOWN, "")) == spec({"issuer-name": ""})


def test_own_attributes_replace_defaults() -> None:
    own = {"files": "autocert", "key-type": "EC-P256", "reload": "signal=HUP,process=nginx"}
    found = spec({"dns-names": "a.example.com"}, **own)
    assert found == parse_attributes({"dns-names": "a.example.com", **own})


@pytest.mark.parametrize(
    "attributes, own, expected",
    [
        (
            {"is-ca": "true"},
            {},
            {"is-ca": 'certmount never issues CA certificates to pods; remove it, or write "false"'},
        ),
        (
            {"issuer-kind": "AWSPCAClusterIssuer", "issuer-group": "awspca.cert-manager.io"},
            {},
            {
                "issuer-kind": "'AWSPCAClusterIssuer' is not an issuer of cert-manager itself; declare an issuer of "
                "certmount in the issuers file, and set issuer to its name",
                "issuer-group": "'awspca.cert-manager.io' is a controller that certmount does not use; declare an "
                "issuer of certmount in the issuers file, and set issuer to its name",
            },
        ),
        (
            {"issuer-name": "my.issuer"},
            {},
            {"issuer-name": "'my.issuer' is not a name; use 1 to 63 lower-case letters, digits and inner hyphens"},
        ),
        (
            {"key-usages": "server auth,code signing"},
            {},
            {
                "key-usages": "'code signing' is not a usage of TLS; use some of server auth, client auth, "
                "digital signature, signing, key encipherment, key agreement"
            },
        ),
        ({"key-algorithm": "DSA"}, {}, {"key-algorithm": "'DSA' is unknown; use one of RSA, ECDSA, Ed25519"}),
        ({"key-size": "1024"}, {}, {"key-size": "'1024' is not a size of RSA keys; use one of 2048, 3072, 4096"}),
        (
            {"key-algorithm": "Ed25519", "key-size": "256"},
            {},
            {"key-size": "'256' is not a size of Ed25519 keys; remove it"},
        ),
        ({"key-encoding": "DER"}, {}, {"key-encoding": "'DER' is unknown; use one of PKCS1, PKCS8"}),
        (
            {"pkcs12-enable": "true", "pkcs12-filename": "a.p12", "pkcs12-password": "secret"},
            {},
            {
                "pkcs12-password": "is readable for everyone who can read the pod; remove it, and set "
                "nodePublishSecretRef to a Secret with the key password"
            },
        ),
        (
            {"key-algorithm": "ECDSA", "key-encoding": "PKCS1"},
            {},
            {
                "key-encoding": "'PKCS1' is not an encoding of EC-P256 keys; use PKCS8, or another "
                "csi.cert-manager.io/key-algorithm"
            },
        ),
        (
            {"key-encoding": "pkcs1"},
            {"key-type": "Ed25519"},
            {"key-encoding": "'PKCS1' is not an encoding of Ed25519 keys; use PKCS8, or another key-type"},
        ),
        (
            {"key-size": "4096"},
            {"key-encoding": "sec1"},
            {
                "key-encoding": "'sec1' is not an encoding of RSA-4096 keys; use pkcs8, or another "
                "csi.cert-manager.io/key-size"
            },
        ),
        (
            {"pkcs12-filename": "a.p12"},
            {},
            {"pkcs12-filename": 'is set, but pkcs12-enable is not; set pkcs12-enable: "true", or remove it'},
        ),
        (
            {"duration": "1h"},
            {"duration": "2h"},
            {"duration": "is set together with duration, which means the same; set one of them"},
        ),
        (
            {"duration": "90d"},
            {},
            {"duration": "'90d' is not a duration; use numbers with the units h, m or s, such as 1h30m"},
        ),
        (
            {"dns-names": "${POD_IP}"},
            {},
            {"dns-names": "'${POD_IP}' has the unknown variable ${POD_IP}; use ${POD_NAME}, "},
        ),
        (
            {"literal-subject": "CN=a", "organizations": "b"},
            {},
            {"literal-subject": "is set together with parts of the subject; set one of them"},
        ),
    ],
)
def test_what_cannot_be_honoured_is_an_error(
    attributes: dict[str, str], own: dict[str, str], expected: dict[str, str]
) -> None:
    found = faults(attributes, **own)
    assert expected.keys() <= found.keys()
    for name, text in expected.items():
        assert found[name].startswith(text)


def test_misspelled_attribute_is_an_error() -> None:
    assert faults({"dns-name": "a.example.com"})["dns-name"] == "is unknown; use dns-names"


def test_parts_of_the_subject_are_escaped_and_in_the_order_of_their_text_form() -> None:
    attributes = {"organizations": "A+B,C", "countries": "DE", "serialnumber": "1,2", "provinces": " #x"}
    translated = translate({PREFIX + key: value for key, value in attributes.items()}).attributes
    assert translated["subject"] == r"2.5.4.5=1\,2,ST=\#x,O=C,O=A\+B,C=DE"


def test_parts_of_the_subject_are_values_in_csv() -> None:
    attributes = {"organizations": '"Example, Inc.",Shop', "localities": '"A ""B"""'}
    translated = translate({PREFIX + key: value for key, value in attributes.items()}).attributes
    assert translated["subject"] == r"L=A \"B\",O=Shop,O=Example\, Inc."
    for wrong in ('"Example, Inc.', '"A"b', "A\nB"):
        expected = f'{wrong!a} is not one line of CSV; write a comma in a value as "Example, Inc."'
        assert faults({"organizations": wrong})["organizations"] == expected


@pytest.mark.parametrize(
    "name, value, fault",
    [
        ("key-usages", "," * 32, "has 33 usages; use at most 32"),
        ("organizations", "a," * 513, "is 1026 characters long; use at most 1024"),
        ("serialnumber", "$" * 1025, "is 1025 characters long; use at most 1024"),
        ("dns-names", "$a" * 1001, "has 1001 variables; use at most 1000"),
        ("uri-sans", "a" * 32769, "is 32769 characters long; use at most 32768"),
    ],
)
def test_value_that_would_take_long_is_one_fault(name: str, value: str, fault: str) -> None:
    assert [str(each) for each in translate({PREFIX + name: value}).faults] == [
        f"volumeAttributes.{PREFIX}{name}: {fault}"
    ]
    assert faults({name: value}) == {name: fault}


def test_no_attribute_needs_much_cpu_time() -> None:
    """A publish call can have attributes of 64 KiB, and they are parsed in the event loop."""
    names = [*OWN, *(PREFIX + name for name in _KNOWN)]
    for name, text in itertools.product(names, (",", "a,", "$a", "$${", "\\,", '"', "=", "1s", "a.", "${POD_NAME}")):
        for value in (text * (65_000 // len(text)), ",".join([text.replace(",", "a") * (320 // len(text))] * 100)):
            started = time.thread_time()
            with contextlib.suppress(CertmountError):
                parse_attributes({name: value}, VARIABLES)
            assert time.thread_time() - started < 0.1, (name, text)  # a value whose cost is quadratic takes seconds


def test_unknown_key_type_has_no_second_fault_about_its_encoding() -> None:
    assert faults({"key-encoding": "PKCS1"}, **{"key-type": "x" * 4000}).keys() == {"key-type"}
    with pytest.raises(CertmountError) as raised:
        parse_attributes({"key-type": "RSA-1024", "key-encoding": "pkcs1"})
    assert [str(fault).partition(":")[0] for fault in raised.value.faults] == ["volumeAttributes.key-type"]


def test_page_describes_each_attribute() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row)) == sorted(_KNOWN)


NAMES = st.sampled_from(sorted(_KNOWN)) | st.text(max_size=10)
VALUES = st.sampled_from(["true", "false", "RSA", "ECDSA", "256", "1h", "a.example.com", "$POD_NAME", ""]) | st.text(
    max_size=20
)


@given(st.dictionaries(NAMES, VALUES, max_size=8))
def test_any_attributes_are_a_spec_or_an_error_in_the_words_of_the_user(attributes: dict[str, str]) -> None:
    try:
        spec(attributes)
    except CertmountError as error:
        for fault in error.faults:
            assert str(fault).startswith(f"volumeAttributes.{PREFIX}")
