"""Findings of the same kind are one line, and their number is bounded."""

from __future__ import annotations

import pytest

from csi_driver.doctor.findings import CheckResult, Severity
from csi_driver.doctor.manifest_checks import are_compatible
from csi_driver.kube.admin.object_reader import outside


def test_findings_that_differ_in_the_node_are_one() -> None:
    result = CheckResult("programs")
    for number in range(7):
        result.error("no registration", "fix it", f"node{number}")
    result.error("no registration", "other fix", "node9")
    first, second = result.findings
    assert first.problem == "node0, node1, node2, node3, node4 and 2 more: no registration"
    assert second.problem == "node9: no registration"


def test_number_of_findings_is_bounded() -> None:
    result = CheckResult("policy")
    for number in range(500):
        result.warning(f"fault {number}", "edit it")
    assert len(result.findings) == 21
    assert result.findings[-1].problem == "and 480 more findings"
    assert {finding.severity for finding in result.findings} == {Severity.WARNING}


def test_findings_cannot_control_a_terminal() -> None:
    result = CheckResult("policy")
    result.error("\x1b[2Jall is well\n", "rm\r")
    assert (result.findings[0].problem, result.findings[0].fix) == ("\\x1b[2Jall is well\\n", "rm\\r")


@pytest.mark.parametrize(
    "versions, expected",
    [
        (["0.1.0"], True),
        (["0.1.0", "0.1.9", "0.2.0"], True),
        (["0.9.0", "0.10.0"], True),
        (["0.1.0", "0.3.0"], False),
        (["0.2.0", "1.0.0"], False),
        (["0.1.0", "0.2.0.dev1"], True),
    ],
)
def test_versions_can_differ_by_one_minor_version(versions: list[str], expected: bool) -> None:
    assert are_compatible(versions) is expected


@pytest.mark.parametrize("value, expected", [(5.0, 0.0), (4.0, 0.0), (3.0, 1.0), (9.5, -1.5)])
def test_value_outside_an_interval(value: float, expected: float) -> None:
    assert outside(value, 4.0, 8.0) == expected
