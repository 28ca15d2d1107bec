"""What counts as a failure of an issuer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.issuance.audit import AuditRecord
from csi_driver.authority.issuance.steps import IssuanceSteps
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

CALLS = "certmount_issuer_calls_total"
_NONE: Any = None  # not used to sign


async def _counted(issue: Callable[[Any], Awaitable[Any]], *, cancel: bool = False) -> dict[str, float]:
    """Return the number of calls by reason."""
    registry = CollectorRegistry()
    steps = IssuanceSteps(_NONE, _NONE, AuthorityMetrics(registry))
    signing = asyncio.create_task(steps.sign("slow", issue, _NONE, AuditRecord()))
    await asyncio.sleep(0)
    if cancel:
        signing.cancel()
    await asyncio.gather(signing, return_exceptions=True)
    samples = [sample for metric in registry.collect() for sample in metric.samples if sample.name == CALLS]
    return {sample.labels["reason"]: sample.value for sample in samples}


@pytest.mark.parametrize(
    "error, reason",
    [
        (CertmountError(Reason.ISSUER_UNAVAILABLE, "unavailable"), "IssuerUnavailable"),
        (RuntimeError("a defect"), "InternalError"),
    ],
    ids=["unavailable", "defect"],
)
async def test_failure_counts_by_reason(error: Exception, reason: str) -> None:
    async def issue(_: Any) -> Any:
        raise error

    assert await _counted(issue) == {reason: 1}


async def test_call_that_its_caller_cancels_does_not_count() -> None:
    """It would fire the alert about the issuer."""

    async def issue(_: Any) -> Any:
        await asyncio.Event().wait()

    assert await _counted(issue, cancel=True) == {}
