"""Each change of a certificate condition is reported once, at a limited rate, with a limited number of retries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport
from csi_driver.node.renewal.certificate_reports import CertificateReporter
from tests.unit.node.virtual_time import run_virtually

FAILING, OVERDUE = CertificateCondition.RENEWAL_FAILING, CertificateCondition.RENEWAL_OVERDUE
EXPIRED, RECOVERED = CertificateCondition.CERTIFICATE_EXPIRED, CertificateCondition.CERTIFICATE_RECOVERED

Step = tuple[float, Callable[[CertificateReporter], None]]


@dataclass
class Authority:
    """Fails until ``available_at``."""

    available_at: float = 0.0
    failure: CertmountError = field(default_factory=lambda: CertmountError(Reason.AUTHORITY_UNAVAILABLE, "refused"))
    received: list[tuple[float, CertificateCondition]] = field(default_factory=list)
    attempts: int = 0

    async def report(self, report: CertificateReport) -> None:
        self.attempts += 1
        assert len(report.message) <= 1024
        now = asyncio.get_running_loop().time()
        if now < self.available_at:
            raise self.failure
        self.received.append((now, report.condition))


def _run(authority: Authority, *steps: Step, hours: float = 2) -> list[CertificateCondition]:
    """Run the steps at their times, and return the conditions that the authority received."""

    async def scenario() -> None:
        reporter, loop = CertificateReporter(authority.report, lambda: 0.5), asyncio.get_running_loop()
        for at, step in steps:
            loop.call_later(at, step, reporter)
        task = asyncio.create_task(reporter.run())
        await asyncio.sleep(hours * 3600)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    run_virtually(scenario())
    return [condition for _, condition in authority.received]


def _report(at: float, condition: CertificateCondition, volume: str = "a") -> Step:
    token: Secret[str] = Secret("token")
    return at, lambda reporter: reporter.report(volume, token, condition, "IssuerUnavailable", "why " * 1000)


def test_each_change_is_reported_once() -> None:
    """A recovery is reported only after another condition."""
    conditions = [RECOVERED, FAILING, FAILING, OVERDUE, EXPIRED, RECOVERED, RECOVERED]
    steps = [_report(100.0 * number, condition) for number, condition in enumerate(conditions)]
    assert _run(Authority(), *steps) == [FAILING, OVERDUE, EXPIRED, RECOVERED]


def test_end_of_an_outage_causes_few_reports() -> None:
    """If a certificate recovers before its condition was reported, nothing is reported."""
    authority = Authority(available_at=3600)
    steps = [_report(600.0, OVERDUE, str(number)) for number in range(110)]
    steps += [_report(3601.0, RECOVERED, str(number)) for number in range(110)]
    assert len(_run(authority, *steps)) <= 4
    assert authority.attempts < 150


def test_rate_is_limited_after_a_burst() -> None:
    authority = Authority()
    _run(authority, *(_report(1.0, EXPIRED, str(number)) for number in range(50)))
    assert sum(at < 2 for at, _ in authority.received) == 10
    assert len(authority.received) == 50
    assert authority.received[-1][0] > 40 * 20


def test_retries_are_limited() -> None:
    """A report is dropped after five attempts or a final failure. Later reports are sent."""
    authority = Authority(available_at=1000)
    assert _run(authority, _report(0.0, EXPIRED), _report(2000.0, OVERDUE, "b")) == [OVERDUE]
    assert authority.attempts == 6
    rejecting = Authority(available_at=1000, failure=CertmountError(Reason.TOKEN_REJECTED, "no"))
    assert _run(rejecting, _report(0.0, EXPIRED)) == []
    assert rejecting.attempts == 1


def test_report_of_a_removed_volume_is_not_retried() -> None:
    authority = Authority(available_at=1000)
    assert _run(authority, _report(0.0, EXPIRED), (0.5, lambda reporter: reporter.forget("a"))) == []
    assert authority.attempts == 1
