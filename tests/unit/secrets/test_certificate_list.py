"""Lists of certificates: one invalid entry never affects the others."""

from __future__ import annotations

import difflib
from unittest import mock

import pytest

from csi_driver.secrets.sources.annotated import SourceRules
from csi_driver.secrets.sources.certificate_list import MAX_FAULTS, parse_certificate_list

RULES = SourceRules(None, "internal")


def test_faults_of_a_hostile_list_are_limited() -> None:
    text = "- secret: good\n  domains: [a.example.com]\n" + "- {secret: UPPER, domains: [a_b]}\n" * 4000
    requests, faults = parse_certificate_list(text.encode(), "web", RULES)
    assert [str(request.secret) for request in requests] == ["web/good"]
    assert len(faults) == MAX_FAULTS + 1
    assert str(faults[-1]) == "list: has 7900 more faults"


def test_hints_for_unknown_keys_are_searched_only_for_the_faults_that_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The controller reads the list after each change. A hint for each of 45,000 keys takes 5 s, and its probe fails then."""
    search = mock.Mock(return_value=["domains"])
    monkeypatch.setattr(difflib, "get_close_matches", search)
    entry = ", ".join(f"domains{number}: x" for number in range(9))
    _requests, faults = parse_certificate_list(f"- {{{entry}}}\n".encode() * 1000, "web", RULES)
    assert search.call_count <= 2 * MAX_FAULTS
    assert str(faults[0]) == "certificates[0].domains0 (line 1): is unknown; did you mean domains?"
    assert (len(faults), str(faults[-1])) == (MAX_FAULTS + 1, "list: has 10900 more faults")
