"""Gauges about the certificates of a component, and the metrics of its process."""

from __future__ import annotations

import math
import time

from prometheus_client import CollectorRegistry, Counter

from csi_driver import __version__
from csi_driver.telemetry.expiry_metrics import CertificateTimes, expiry_gauges
from csi_driver.telemetry.process_metrics import register_process_metrics

NOW = 1000.0
ROOTS_ONLY = CertificateTimes(math.inf, math.inf)


def _gauges(*times: CertificateTimes) -> dict[str, float]:
    families = expiry_gauges("x", "volumes", times, NOW)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_certificates_are_overdue_until_they_expire() -> None:
    valid, overdue = CertificateTimes(NOW + 1, NOW + 10), CertificateTimes(NOW, NOW + 5)
    expired = CertificateTimes(NOW - 10, NOW)
    assert _gauges(valid, ROOTS_ONLY) == {
        "x_first_expiry_timestamp_seconds": NOW + 10,
        "x_renewals_overdue": 0,
        "x_certificates_expired": 0,
    }
    assert _gauges(valid, overdue, expired, expired, ROOTS_ONLY) == {
        "x_first_expiry_timestamp_seconds": NOW,
        "x_renewals_overdue": 1,
        "x_certificates_expired": 2,
    }


def test_first_expiry_is_absent_without_certificates() -> None:
    assert _gauges(ROOTS_ONLY) == _gauges() == {"x_renewals_overdue": 0, "x_certificates_expired": 0}


def test_processes_have_a_version_and_a_clock_and_no_creation_times() -> None:
    registry = CollectorRegistry()
    register_process_metrics(registry)
    Counter("calls", "Number of calls.", registry=registry)
    before = time.time()
    samples = {sample.name: sample for metric in registry.collect() for sample in metric.samples}
    assert samples["certmount_build_info"].labels == {"version": __version__}
    assert before <= samples["certmount_clock_timestamp_seconds"].value <= time.time()
    assert samples["process_resident_memory_bytes"].value > 1e6
    assert "calls_created" not in samples
