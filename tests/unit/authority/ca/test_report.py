"""``certmount ca status`` says what a rotation waits for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.ca.report import CAStatusReport
from csi_driver.authority.ca.rotation import Acknowledgements, RetiredRoot, RotationPhase, RotationState
from csi_driver.authority.ca.state import CAState

NOW = 2_000_000_000
CA, NEXT_CA = (make_keyring(datetime.fromtimestamp(NOW, UTC)) for _ in range(2))
AFTER_READING = 40  # every replica has read a phase then


@pytest.mark.parametrize(
    "phase, since, missing, expected",
    [
        (RotationPhase.STEADY, NOW, "", "none; to rotate the CA, run: certmount ca rotate"),
        (
            RotationPhase.ANNOUNCING,
            0,
            "",
            "within seconds an authority reads this phase, and its time starts; check that",
        ),
        (RotationPhase.ANNOUNCING, NOW - AFTER_READING + 5, "", "at 2033-05-18T03:33:25Z (in 5s): every replica knows"),
        (RotationPhase.DISTRIBUTING, NOW, "b", "the next CA signs when 1 more node has acknowledged"),
        (RotationPhase.DISTRIBUTING, NOW, "bc", "the next CA signs when 2 more nodes have acknowledged"),
        (
            RotationPhase.DISTRIBUTING,
            NOW,
            "",
            "within seconds: the next CA signs; up to 7 minutes later if ClusterTrustBundles or ConfigMaps contain the roots",
        ),
        (
            RotationPhase.RETIRING,
            NOW,
            "",
            "at 2033-05-18T03:35:00Z (in 1m40s): nodes remove the former root from every",
        ),
    ],
)
def test_next_step(phase: RotationPhase, since: int, missing: Sequence[str], expected: str) -> None:
    retired = (RetiredRoot(NEXT_CA.roots_der[0], 60),) if phase is RotationPhase.RETIRING else ()
    state = CAState(CA, NEXT_CA if phase.before_switch else None, RotationState(phase, NOW, since, retired=retired))
    report = CAStatusReport(state, Acknowledgements(frozenset("a"), frozenset("a").union(missing)), NOW)
    assert report.next_step.startswith(expected)
    assert list(report.lines())[-1] == f"next step     {report.next_step}"
    assert report.document()["nextStep"] == report.next_step


def test_stopped_rotation_says_how_to_go_on() -> None:
    state = RotationState(RotationPhase.DISTRIBUTING, NOW, NOW, stopped=True)
    report = CAStatusReport(CAState(CA, NEXT_CA, state), Acknowledgements(frozenset(), frozenset("a")), NOW)
    assert report.next_step == (
        "none, because the rotation is stopped; to resume, run: certmount ca rotate;"
        " to abandon the next CA, run: certmount ca stop --discard"
    )


def test_root_of_a_ca_without_end_is_trusted_until_the_last_time() -> None:
    """Its certificates can have any lifetime; RFC 5280 section 4.1.2.5 has the end 99991231235959Z."""
    without_end = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()) - NOW
    retired = (RetiredRoot(NEXT_CA.roots_der[0], without_end),)
    state = CAState(CA, None, RotationState(RotationPhase.RETIRING, NOW, NOW, retired=retired))
    report = CAStatusReport(state, Acknowledgements(frozenset(), frozenset()), NOW)
    assert "              trusted until 9999-12-31T23:59:59Z" in list(report.lines())
    assert report.document()["retired"][0]["trustedUntil"] == "9999-12-31T23:59:59Z"
