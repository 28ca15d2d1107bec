"""Operations that are retried or run periodically."""

from __future__ import annotations

import pytest

from csi_driver.authority.retry import retry, run_periodically
from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import CertmountError, Reason
from tests.support.waiting import in_background, until


class Operation:
    """Fails with each of the reasons in turn, then succeeds."""

    calls = 0

    def __init__(self, *reasons: Reason) -> None:
        self.reasons = list(reasons)

    async def __call__(self) -> str:
        self.calls += 1
        if self.reasons:
            raise CertmountError(self.reasons.pop(0), "failed")
        return "done"


async def test_retry_waits_longer_after_each_retryable_failure() -> None:
    delays: list[float] = []
    operation = Operation(Reason.ISSUER_UNAVAILABLE, Reason.INTERNAL, Reason.ISSUER_UNAVAILABLE)
    assert await retry(operation, Backoff(0.001, 0.003), lambda _, delay_s: delays.append(delay_s)) == "done"
    assert delays == [0.001, 0.002, 0.003]


async def test_retry_raises_a_failure_that_is_not_retryable() -> None:
    operation = Operation(Reason.INVALID_CA)
    with pytest.raises(CertmountError, match="InvalidCA"):
        await retry(operation, Backoff(0.001, 0.003), lambda *_: None)
    assert operation.calls == 1


async def test_periodic_operation_continues_after_a_failure() -> None:
    failures: list[CertmountError] = []
    operation = Operation(Reason.INVALID_POLICY)
    async with in_background(run_periodically(0.001, operation, failures.append)):
        await until(lambda: operation.calls >= 3, "three runs")
    assert [error.reason for error in failures] == [Reason.INVALID_POLICY]
