"""Subjects: what users write, what the policy compares, and what is in the certificate."""

from __future__ import annotations

import contextlib
import string

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.der_bounds import MAX_SUBJECT_BYTES
from csi_driver.core.errors import CertmountError
from csi_driver.core.names import InvalidName
from csi_driver.core.spec import KeyType
from csi_driver.core.subject import MAX_SUBJECT_LENGTH, Subject, SubjectAttribute
from tests.unit.core import pki

_TYPES = ("CN", "O", "OU", "ST", "L", "STREET")
_VALUES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=16)
_ATTRIBUTES = st.lists(
    st.builds(
        SubjectAttribute, st.sampled_from(_TYPES), _VALUES.filter(lambda text: not text.lower().startswith("system:"))
    ),
    min_size=1,
    max_size=10,
    unique_by=lambda attribute: attribute.type,
)


@given(_ATTRIBUTES)
def test_text_and_certificate_have_the_same_attributes(attributes: list[SubjectAttribute]) -> None:
    subject = Subject(tuple(attributes))
    assert Subject.parse(str(subject)) == subject
    assert Subject.of(subject.name) == subject


@given(st.text(max_size=200))
def test_any_text_is_a_subject_or_an_error(text: str) -> None:
    try:
        assert Subject.parse(text)
    except InvalidName as error:
        assert str(error)


@pytest.mark.parametrize("kind", ["CN", "O", "C", "STREET", "POSTALCODE", "SERIALNUMBER"])
def test_valid_subject_is_der(kind: str) -> None:
    """Some types are a PrintableString, in which TLS libraries accept ASCII without ``_``, ``@`` and others only."""
    for value in [*string.printable.strip(), "é", "\U0001f600"]:
        text = f"{kind}={value * 2}"
        with contextlib.suppress(InvalidName):
            name = Subject((SubjectAttribute.parse(text),)).name
            request = x509.CertificateSigningRequestBuilder().subject_name(name)
            assert request.sign(pki.key_of(KeyType.ED25519), None).subject == name


@given(
    st.lists(st.sampled_from(("O", "OU", "SERIALNUMBER")), min_size=1, max_size=10),
    st.sampled_from("a\u00e9\u4e00\U0001f600"),
)
def test_longest_subject_is_not_too_long_for_a_certificate(kinds: list[str], character: str) -> None:
    """The node rejects a certificate with a longer subject."""
    part = MAX_SUBJECT_LENGTH // len(kinds) - 14
    text = ",".join(f"{kind}={'a' * part if kind == 'SERIALNUMBER' else character * part}" for kind in kinds)
    with contextlib.suppress(InvalidName):
        assert len(Subject.parse(text).name.public_bytes()) <= MAX_SUBJECT_BYTES


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "has 0 attributes; use 1 to 10"),
        (",".join(["OU=a"] * 11), "has 11 attributes; use 1 to 10"),
        ("shop", "is not a subject such as CN=shop,O=Example"),
        ("CN=" + "a" * 65, "with values of 1 to 64 bytes"),
        ("C=Germany", "is not a subject such as"),
        ("CN=a+O=b", "has two attributes that are joined by +; separate them by a comma"),
        ("CN=a,CN=b", "has more than one common name"),
        ("DC=example", "has the unknown attribute type 0.9.2342.19200300.100.1.25; use CN, O, OU,"),
        ("O=system:masters", "has the attribute O with the prefix system:, which is reserved for Kubernetes"),
        ("CN=SYSTEM:admin", "has the attribute CN with the prefix system:"),
        ("CN=\\ system:admin", "has the attribute CN with control characters, or with spaces around its value"),
        ("CN=a\\00b", "has the attribute CN with control characters"),
        ("CN=a\u202eb", "has the attribute CN with control characters"),
        ("O=" + "a" * MAX_SUBJECT_LENGTH, "is 1026 bytes long; a subject has at most 1024"),
        ("O=" + "\U0001f600" * 512, "is 2050 bytes long; a subject has at most 1024"),
        ("C=??", "has the attribute C with other characters than it can have; use 2 letters"),
        ("C=é", "has the attribute C with other characters than it can have; use 2 letters"),
        (
            "SERIALNUMBER=a_b",
            "has the attribute SERIALNUMBER with other characters than it can have; use letters, digits",
        ),
    ],
)
def test_faults(text: str, problem: str) -> None:
    with pytest.raises(InvalidName) as error:
        Subject.parse(text)
    assert problem in str(error.value)


def test_attributes_of_a_volume() -> None:
    spec = parse_attributes({"common-name": "${POD_NAME}", "subject": "O=Example, OU=Shop"}, {"POD_NAME": "db-0"})
    assert str(spec.subject) == "CN=db-0,O=Example,OU=Shop"
    assert spec.subject.name == x509.Name.from_rfc4514_string("CN=db-0,O=Example,OU=Shop")
    with pytest.raises(
        CertmountError, match="common-name: is set together with a common name in subject; set it in one"
    ):
        parse_attributes({"common-name": "a", "subject": "CN=b"})
    with pytest.raises(CertmountError, match="subject: together with common-name, has 11 attributes; use 1 to 10"):
        parse_attributes({"common-name": "a", "subject": ",".join(["OU=a"] * 10)})
    with pytest.raises(CertmountError, match="subject: together with common-name, is 1032 bytes long"):
        parse_attributes({"common-name": "a" * 10, "subject": "O=" + "a" * 1016})


def test_only_a_dns_name_as_common_name_needs_no_permission() -> None:
    subject = Subject.parse("CN=a.test,O=Example")
    assert [attribute.text for attribute in subject.beyond(pki.names("a.test"))] == ["O=Example"]
    assert [attribute.text for attribute in subject.beyond(pki.names("b.test"))] == ["CN=a.test", "O=Example"]
