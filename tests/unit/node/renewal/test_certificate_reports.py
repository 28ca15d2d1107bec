"""Each change of a certificate condition is reported once, at a limited rate, with a limited number of retries."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport
from csi_driver.node.renewal.certificate_reports import MAX_WAITING_REPORTS, CertificateReporter
from tests.support.waiting import in_background
from tests.unit.node.certificates import pod_named
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
    volumes: list[str] = field(default_factory=list)
    attempts: int = 0
    renewed_at: float = math.inf  # from when on the pods have new tokens
    expired_at: float = math.inf  # of the first tokens
    seconds: float = 0.0  # that a report takes

    def token_of(self, volume: str) -> Secret[str]:
        is_new = asyncio.get_running_loop().time() >= self.renewed_at
        return Secret(f"{'new' if is_new else 'old'} token of {volume}")

    async def report(self, report: CertificateReport) -> None:
        self.attempts += 1
        assert len(report.message) <= 1024
        await asyncio.sleep(self.seconds)
        now = asyncio.get_running_loop().time()
        if now < self.available_at:
            raise self.failure
        age, _, volume = report.token.reveal().partition(" token of ")
        if age == "old" and now >= self.expired_at:
            raise CertmountError(Reason.TOKEN_EXPIRED, "pod token: has expired")
        self.received.append((now, report.condition))
        self.volumes.append(volume)


def _run(authority: Authority, *steps: Step, hours: float = 2) -> list[CertificateCondition]:
    """Run the steps at their times, and return the conditions that the authority received."""

    async def scenario() -> None:
        reporter = CertificateReporter(authority.report, authority.token_of, lambda: 0.5)
        loop = asyncio.get_running_loop()
        for at, step in steps:
            loop.call_later(at, step, reporter)
        async with in_background(reporter.run()):
            await asyncio.sleep(hours * 3600)

    run_virtually(scenario())
    return [condition for _, condition in authority.received]


def _report(at: float, condition: CertificateCondition, volume: str = "a", namespace: str = "web") -> Step:
    pod = pod_named(volume, namespace)
    return at, lambda reporter: reporter.report(volume, pod, condition, "IssuerUnavailable", "why " * 1000)


def test_each_change_is_reported_once() -> None:
    conditions = [RECOVERED, FAILING, FAILING, OVERDUE, EXPIRED, RECOVERED, RECOVERED]
    steps = [_report(100.0 * number, condition) for number, condition in enumerate(conditions)]
    assert _run(Authority(), *steps) == [FAILING, OVERDUE, EXPIRED, RECOVERED]


def test_end_of_an_outage_causes_few_reports() -> None:
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


def test_namespace_with_many_reports_does_not_delay_or_drop_those_of_others() -> None:
    authority = Authority()
    flood = [_report(1.0, EXPIRED, str(number), "flood") for number in range(MAX_WAITING_REPORTS)]
    _run(authority, *flood, _report(60.0, EXPIRED, "victim", "victim"), hours=10)
    assert len(authority.received) == MAX_WAITING_REPORTS // 2 + 1
    reported_at, _ = authority.received[authority.volumes.index("victim")]
    assert reported_at - 60 < 60


def test_successful_renewals_do_not_use_up_the_share_of_failures() -> None:
    """After a burst, reports wait for minutes. Meanwhile, a namespace can renew more volumes than its share allows reports."""
    authority = Authority()
    burst = [_report(1.0, EXPIRED, f"other-{number}", "other") for number in range(20)]
    renewed = [_report(2.0, RECOVERED, f"renewed-{number}") for number in range(MAX_WAITING_REPORTS)]
    _run(authority, *burst, *renewed, _report(3.0, EXPIRED, "expired"))
    assert "expired" in authority.volumes


def test_recovery_while_the_failure_is_sent_is_reported() -> None:
    authority = Authority(seconds=5)
    assert _run(authority, _report(0.0, EXPIRED), _report(1.0, RECOVERED)) == [EXPIRED, RECOVERED]


def test_retries_are_limited() -> None:
    authority = Authority(available_at=1000)
    assert _run(authority, _report(0.0, EXPIRED), _report(2000.0, OVERDUE, "b")) == [OVERDUE]
    assert authority.attempts == 6
    rejecting = Authority(available_at=1000, failure=CertmountError(Reason.TOKEN_REJECTED, "no"))
    assert _run(rejecting, _report(0.0, EXPIRED)) == []
    assert rejecting.attempts == 1


def test_report_that_waits_is_sent_with_the_present_token() -> None:
    authority = Authority(renewed_at=100, expired_at=150)
    _run(authority, *(_report(1.0, EXPIRED, str(number)) for number in range(50)))
    assert (len(authority.received), authority.attempts) == (50, 50)


def test_expired_token_does_not_delay_the_reports_of_others() -> None:
    authority = Authority(expired_at=0)
    _run(authority, *(_report(1.0, EXPIRED, str(number)) for number in range(9)), hours=0.001)
    assert authority.attempts == 9


def test_report_of_a_removed_volume_is_not_retried() -> None:
    authority = Authority(available_at=1000)
    assert _run(authority, _report(0.0, EXPIRED), (0.5, lambda reporter: reporter.forget("a"))) == []
    assert authority.attempts == 1
