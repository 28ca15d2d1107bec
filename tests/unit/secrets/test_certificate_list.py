"""Lists of certificates: one invalid entry never affects the others."""

from __future__ import annotations

from csi_driver.secrets.sources.annotated import SourceRules
from csi_driver.secrets.sources.certificate_list import MAX_FAULTS, parse_certificate_list

RULES = SourceRules(None, "internal")


def test_faults_of_a_hostile_list_are_limited() -> None:
    text = "- secret: good\n  domains: [a.example.com]\n" + "- {secret: UPPER, domains: [a_b]}\n" * 4000
    requests, faults = parse_certificate_list(text.encode(), "web", RULES)
    assert [str(request.secret) for request in requests] == ["web/good"]
    assert len(faults) == MAX_FAULTS + 1
    assert str(faults[-1]) == "list: has 7900 more faults"
