"""Which conditions of a certificate are reported, by the wall clock."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.secret import Secret
from csi_driver.node.authority_messages import CertificateCondition
from csi_driver.node.pods import PodToken
from csi_driver.node.renewal.certificate_conditions import ConditionTracker
from csi_driver.node.renewal.certificate_reports import CertificateReporter
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable
from tests.support.waiting import in_background
from tests.unit.host.samples import record
from tests.unit.node.virtual_time import run_virtually


@pytest.mark.parametrize("step_s", [0.0, -0.1, -300.0, -3000.0, 300.0])
def test_overdue_and_expired_certificates_are_reported_after_a_clock_step(step_s: float) -> None:
    """The clock is set between the renewal time and the time when the renewal is overdue."""
    found: list[tuple[float, CertificateCondition]] = []

    async def scenario() -> None:
        loop, shift_s = asyncio.get_running_loop(), [0.0]

        def clock() -> float:
            return loop.time() + shift_s[0]

        reporter = mock.create_autospec(CertificateReporter, instance=True)
        reporter.report.side_effect = lambda *arguments: found.append((clock(), arguments[2]))
        remover = mock.create_autospec(VolumeRemover, instance=True)
        remover.remove_if_pod_is_gone.return_value = False
        volumes = VolumeTable()
        tracker = ConditionTracker(volumes, remover, lambda _issuer: None, reporter, clock)
        tracker.expiry_checks.elapsed = loop.time
        volume = Volume(
            record(issued_at=0.0, renew_at=1000.0, not_after=2000.0),
            parse_attributes({}),
            PodToken(Secret("token"), mock.Mock()),
        )
        volumes.keep(volume)
        tracker.watch(volume)
        loop.call_later(1100, shift_s.__setitem__, 0, step_s)
        async with in_background(tracker.expiry_checks.run()):
            await asyncio.sleep(10_000)

    run_virtually(scenario())
    assert list(dict.fromkeys(condition for _, condition in found)) == [
        CertificateCondition.RENEWAL_OVERDUE,
        CertificateCondition.CERTIFICATE_EXPIRED,
    ]
    earliest = {CertificateCondition.RENEWAL_OVERDUE: 1500.0, CertificateCondition.CERTIFICATE_EXPIRED: 2000.0}
    assert all(at >= earliest[condition] for at, condition in found)
    assert max(at for at, _ in found) < 2100.0
