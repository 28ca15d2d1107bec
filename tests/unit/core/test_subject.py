"""Subjects: what users write, what the policy compares, and what is in the certificate."""

from __future__ import annotations

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.errors import CertmountError
from csi_driver.core.names import InvalidName
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
        ("O=" + "a" * MAX_SUBJECT_LENGTH, "is 1026 characters long; a subject has at most 1024"),
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


def test_only_a_dns_name_as_common_name_needs_no_permission() -> None:
    subject = Subject.parse("CN=a.test,O=Example")
    assert [attribute.text for attribute in subject.beyond(pki.names("a.test"))] == ["O=Example"]
    assert [attribute.text for attribute in subject.beyond(pki.names("b.test"))] == ["CN=a.test", "O=Example"]
