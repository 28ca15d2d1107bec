"""Each change is told once, a few at a time, and never for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport
from csi_driver.node.renewal.reports import Reports, report_of
from tests.unit.node.virtual_time import run_virtually


def _report(condition: CertificateCondition) -> CertificateReport:
    return report_of(Secret("token"), condition, "IssuerUnavailable", "why " * 1000)


@dataclass
class _Listener:
    """An authority that is away until a moment."""

    back_at: float = 0.0
    failure: CertmountError = field(default_factory=lambda: CertmountError(Reason.AUTHORITY_UNAVAILABLE, "gone"))
    told: list[tuple[float, CertificateCondition]] = field(default_factory=list)
    tries: int = 0

    async def report(self, report: CertificateReport) -> None:
        self.tries += 1
        assert len(report.message) <= 1024
        now = asyncio.get_running_loop().time()
        if now < self.back_at:
            raise self.failure
        self.told.append((now, report.condition))


def _play(
    listener: _Listener, *steps: tuple[float, Callable[[Reports], None]], hours: float = 2
) -> list[CertificateCondition]:
    async def story() -> None:
        reports, loop = Reports(listener, lambda: 0.5), asyncio.get_running_loop()
        for moment, step in steps:
            loop.call_later(moment, step, reports)
        task = asyncio.create_task(reports.run())
        await asyncio.sleep(hours * 3600)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    run_virtually(story())
    return [condition for _, condition in listener.told]


def _tell(condition: CertificateCondition, volume: str = "a") -> Callable[[Reports], None]:
    return lambda reports: reports.tell(volume, _report(condition))


def test_each_change_once() -> None:
    """Failing, failing again, overdue, expired, recovered: four reports; a recovery from nothing is none."""
    listener = _Listener()
    order = [
        CertificateCondition.CERTIFICATE_RECOVERED,
        CertificateCondition.RENEWAL_FAILING,
        CertificateCondition.RENEWAL_FAILING,
        CertificateCondition.RENEWAL_OVERDUE,
    ]
    order += [
        CertificateCondition.CERTIFICATE_EXPIRED,
        CertificateCondition.CERTIFICATE_RECOVERED,
        CertificateCondition.CERTIFICATE_RECOVERED,
    ]
    told = _play(listener, *((100.0 * number, _tell(condition)) for number, condition in enumerate(order)))
    assert told == [
        CertificateCondition.RENEWAL_FAILING,
        CertificateCondition.RENEWAL_OVERDUE,
        CertificateCondition.CERTIFICATE_EXPIRED,
        CertificateCondition.CERTIFICATE_RECOVERED,
    ]


def test_an_outage_that_ends_is_no_flood() -> None:
    """Whoever recovered before anyone heard of his trouble is not spoken of."""
    listener = _Listener(back_at=3600)
    steps = [(600.0, _tell(CertificateCondition.RENEWAL_OVERDUE, str(number))) for number in range(110)]
    steps += [(3601.0, _tell(CertificateCondition.CERTIFICATE_RECOVERED, str(number))) for number in range(110)]
    told = _play(listener, *steps)
    assert len(told) <= 4
    assert listener.tries < 150


def test_few_at_a_time() -> None:
    """Ten at once, then one in half a minute, however many there are."""
    listener = _Listener()
    _play(listener, *((1.0, _tell(CertificateCondition.CERTIFICATE_EXPIRED, str(number))) for number in range(50)))
    assert sum(moment < 2 for moment, _ in listener.told) == 10
    assert len(listener.told) == 50
    assert listener.told[-1][0] > 40 * 20


def test_not_for_ever() -> None:
    """What can't be told in five tries, or is refused, is given up; what comes later is told."""
    listener = _Listener(back_at=1000)
    told = _play(
        listener,
        (0.0, _tell(CertificateCondition.CERTIFICATE_EXPIRED)),
        (2000.0, _tell(CertificateCondition.RENEWAL_OVERDUE, "b")),
    )
    assert (told, listener.tries) == ([CertificateCondition.RENEWAL_OVERDUE], 6)
    refusing = _Listener(back_at=1000, failure=CertmountError(Reason.TOKEN_REJECTED, "no"))
    assert (_play(refusing, (0.0, _tell(CertificateCondition.CERTIFICATE_EXPIRED))), refusing.tries) == ([], 1)


def test_a_volume_that_is_gone_is_not_spoken_of() -> None:
    """Nor is a report of it tried again."""
    listener = _Listener(back_at=1000)
    told = _play(
        listener, (0.0, _tell(CertificateCondition.CERTIFICATE_EXPIRED)), (0.5, lambda reports: reports.forget("a"))
    )
    assert (told, listener.tries) == ([], 1)
