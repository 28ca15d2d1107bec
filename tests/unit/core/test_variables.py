"""Variables in names: substitution, and what pods try with them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import ATTRIBUTES, parse_attributes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import InvalidName
from csi_driver.core.variables import MAX_SUBSTITUTED, VARIABLES, substitute
from tests.unit.core import strategies
from tests.unit.core.outcomes import outcome

VALUES = {
    "POD_NAME": "db-0",
    "POD_NAMESPACE": "shop",
    "POD_UID": "0b7a3c5e-6d0f-4e57-9d7a-0c9f1f6d2a11",
    "SERVICE_ACCOUNT_NAME": "edge",
    "NODE_NAME": "worker-1.example.com",
}
_pieces = st.one_of(
    st.sampled_from(["$", "{", "}", "$$", "${", "$${", *(f"${{{name}}}" for name in VARIABLES), "${FOO}", "a.example"]),
    strategies.hostile_texts,
)
texts = st.lists(_pieces, max_size=12).map("".join)


def problem_of(attribute: str, value: str, variables: dict[str, str] | None = None) -> str:
    error = outcome(
        lambda: parse_attributes({attribute: value}, VALUES if variables is None else variables), CertmountError
    )
    assert isinstance(error, CertmountError)
    assert error.reason is Reason.INVALID_ATTRIBUTES
    (fault,) = error.faults
    assert isinstance(fault, Fault)
    assert fault.field == f"volumeAttributes.{attribute}"
    return fault.problem


def test_every_name_attribute_has_variables() -> None:
    spec = parse_attributes(
        {
            "name": "${POD_NAME}.db.${POD_NAMESPACE}.svc",
            "dns-names": "${NODE_NAME}, *.${POD_NAME}.example.com",
            "uri-sans": "https://example.com/${SERVICE_ACCOUNT_NAME}/${POD_UID}",
            "email-sans": "${SERVICE_ACCOUNT_NAME}@${NODE_NAME}",
            "spiffe": "false",
        },
        VALUES,
    )
    assert list(map(str, spec.names)) == [
        "db-0.db.shop.svc",
        "worker-1.example.com",
        "*.db-0.example.com",
        "https://example.com/edge/0b7a3c5e-6d0f-4e57-9d7a-0c9f1f6d2a11",
        "edge@worker-1.example.com",
    ]


def test_other_attributes_have_no_variables() -> None:
    assert "'${POD_NAME}' is not a name" in problem_of("issuer", "${POD_NAME}")


@pytest.mark.parametrize(
    "value, problem",
    [
        (
            "${POD}.example.com",
            (
                "'${POD}.example.com' has the unknown variable ${POD}; use ${POD_NAME}, ${POD_NAMESPACE}, ${POD_UID}, "
                "${SERVICE_ACCOUNT_NAME}, ${NODE_NAME}, or write $${ for the text ${"
            ),
        ),
        ("${pod_name}.example.com", "has the unknown variable ${pod_name}; use ${POD_NAME}"),
        ("${}.example.com", "has the unknown variable ${}; use"),
        ("$${" * 65, "has 65 variables; use at most 64"),
        ("${" + "A" * 5000 + "}", "has the unknown variable ${" + "A" * 37 + "...}; use"),
        ("${POD_NAME.example.com", "has ${ without }; write $${ for the text ${"),
        ("${${POD_NAME}}.example.com", "has ${ without }"),
        ("$${POD_NAME}.x", "'$${POD_NAME}.x', which is '${POD_NAME}.x' for this pod, has the label '${pod_name}'"),
        ("$POD_NAME.example.com", "'$POD_NAME.example.com' has the label '$pod_name'"),
        (
            "${POD_UID}." * 60 + "example.com",
            "is longer than 2048 characters with the values of its variables",
        ),
        ("${NODE_NAME}." * 15 + "x", "for this pod, is 316 characters long; a DNS name has at most 253"),
    ],
)
def test_invalid_variable_is_an_error(value: str, problem: str) -> None:
    assert problem in problem_of("name", value)


@pytest.mark.parametrize(
    "pod_name", ["${NODE_NAME}", "a,evil.example.com", "a/../b", "*", "a@b", "a b", "a\n", "", "x" * 254]
)
def test_value_that_is_no_name_of_an_object_is_not_used(pod_name: str) -> None:
    """A pod cannot add names, labels of other domains or variables by its own name."""
    variables = {**VALUES, "POD_NAME": pod_name}
    for attribute in ("name", "dns-names", "uri-sans", "ip-sans", "email-sans"):
        problem = problem_of(attribute, "${POD_NAME}", variables)
        assert "has the variable ${POD_NAME}, which has no usable value for this pod" in problem


def test_pod_without_known_values_is_an_error() -> None:
    assert "has no usable value" in problem_of("name", "${POD_NAME}", {})


@given(texts, st.dictionaries(st.sampled_from(VARIABLES), st.one_of(texts, st.just("db-0"))))
def test_result_is_bounded_and_replaced_once(text: str, values: dict[str, str]) -> None:
    result = outcome(lambda: substitute(text, values), InvalidName)
    if isinstance(result, InvalidName):
        assert "${" in text
        assert len(str(result)) < 300
    else:
        assert len(result) <= max(len(text), MAX_SUBSTITUTED)
        assert "${" in text or result == text
        assert result.count("${") == text.count("$${")


@given(st.dictionaries(st.sampled_from([row.name for row in ATTRIBUTES]), texts))
def test_any_text_with_variables_is_valid_or_an_error(attributes: dict[str, str]) -> None:
    spec = outcome(lambda: parse_attributes(attributes, VALUES), CertmountError)
    assert not isinstance(spec, CertmountError) or spec.reason is Reason.INVALID_ATTRIBUTES
