"""Errors say one word that can be searched for, everything that is wrong, and whether to try again."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import REASONS, CertmountError, FailureKind, Fault, Reason, Retry


def test_every_reason_has_its_own_camel_case_word() -> None:
    """Kubernetes takes CamelCase reasons only; a word leads back to its reason."""
    words = [reason.word for reason in Reason]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(r"(?:[A-Z][A-Za-z]+)+", word) and len(word) <= 128 for word in words)
    assert {word: REASONS[word] for word in words} == {str(reason): reason for reason in Reason}


@pytest.mark.parametrize("kind", FailureKind)
def test_only_a_failure_that_can_pass_by_itself_is_retryable_for_the_kubelet(kind: FailureKind) -> None:
    """The kubelet retries on UNAVAILABLE, RESOURCE_EXHAUSTED and ABORTED; the node retries those within 30 s, or with the next token."""
    assert kind.retryable == (kind.retry in (Retry.BACKOFF, Retry.ON_TOKEN))
    assert kind.retryable == (kind.status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"))


@pytest.mark.parametrize("reason", Reason)
def test_an_error_without_faults_still_says_something(reason: Reason) -> None:
    """The word, and what may be done about it."""
    assert str(CertmountError(reason)) == f"{reason.word}: {reason.kind.meaning}"


def test_one_fault_is_told_plainly() -> None:
    """Field, problem and hint."""
    assert str(Fault("duration", "is zero", "write 1h")) == "duration: is zero; write 1h"
    assert str(Fault("duration", "is zero")) == "duration: is zero"
    error = CertmountError(Reason.INVALID_ATTRIBUTES, Fault("duration", "is zero"))
    assert str(error) == "InvalidAttributes: duration: is zero"


def test_several_faults_are_numbered() -> None:
    """Each can be found in the one line of an event."""
    error = CertmountError(
        Reason.NAME_NOT_ALLOWED, Fault("a.example", "no rule"), Fault("b.example", "no rule", "ask"), "more"
    )
    assert str(error) == "NameNotAllowed: (1) a.example: no rule (2) b.example: no rule; ask (3) more"


@given(st.sampled_from(Reason), st.lists(st.builds(Fault, st.text(min_size=1), st.text(min_size=1), st.text())))
def test_no_fault_is_lost(reason: Reason, faults: list[Fault]) -> None:
    """The error keeps every fault, in order, and its text holds all of them."""
    error = CertmountError(reason, *faults)
    assert error.faults == tuple(faults)
    assert str(error).startswith(f"{reason.word}: ")
    assert all(str(fault) in str(error) for fault in faults)
