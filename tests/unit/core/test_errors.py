"""Errors: reasons, kinds and texts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import REASONS, CertmountError, FailureKind, Fault, Reason, Retry


def test_reasons_are_unique_camel_case_words() -> None:
    words = [reason.word for reason in Reason]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(r"(?:[A-Z][A-Za-z]+)+", word) and len(word) <= 128 for word in words)
    assert {word: REASONS[word] for word in words} == {str(reason): reason for reason in Reason}


@pytest.mark.parametrize("kind", FailureKind)
def test_retryable_kinds_have_statuses_that_the_kubelet_retries(kind: FailureKind) -> None:
    assert kind.retryable == (kind.retry in (Retry.BACKOFF, Retry.ON_TOKEN))
    assert kind.retryable == (kind.status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"))


@pytest.mark.parametrize("reason", Reason)
def test_error_without_faults_has_the_meaning_of_its_kind(reason: Reason) -> None:
    assert str(CertmountError(reason)) == f"{reason.word}: {reason.kind.meaning}"


def test_error_with_one_fault() -> None:
    assert str(Fault("duration", "is zero", "write 1h")) == "duration: is zero; write 1h"
    assert str(Fault("duration", "is zero")) == "duration: is zero"
    error = CertmountError(Reason.INVALID_ATTRIBUTES, Fault("duration", "is zero"))
    assert str(error) == "InvalidAttributes: duration: is zero"


def test_characters_that_control_a_terminal_are_escaped() -> None:
    """Servers and users choose parts of the text."""
    hostile = "a\nb\x1b[31m\u202e\ud800 100% \\"
    shown = "a\\nb\\x1b[31m\\u202e\\ud800 100% \\"
    assert str(CertmountError(Reason.INTERNAL, hostile)) == f"InternalError: {shown}"
    assert str(Fault(hostile, hostile, hostile)) == f"{shown}: {shown}; {shown}"
    assert str(CertmountError(Reason.INTERNAL, "bücher %s")) == "InternalError: bücher %s"


def test_several_faults_are_numbered() -> None:
    faults = Fault("a.example", "no rule"), Fault("b.example", "no rule", "ask"), "more"
    error = CertmountError(Reason.NAME_NOT_ALLOWED, *faults)
    assert str(error) == "NameNotAllowed: (1) a.example: no rule (2) b.example: no rule; ask (3) more"


@given(st.sampled_from(Reason), st.lists(st.builds(Fault, st.text(min_size=1), st.text(min_size=1), st.text())))
def test_error_contains_all_faults(reason: Reason, faults: list[Fault]) -> None:
    error = CertmountError(reason, *faults)
    assert error.faults == tuple(faults)
    assert str(error).startswith(f"{reason.word}: ")
    assert all(str(fault) in str(error) for fault in faults)
