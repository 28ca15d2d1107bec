"""Gauges about the certificates of a component: how many expire, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily


class CertificateTimes(NamedTuple):
    """When a certificate is overdue for renewal, and when it expires, in unix seconds; infinity for one that does not exist."""

    overdue_at: float
    not_after: float


def expiry_gauges(
    prefix: str, owners: str, times: Iterable[CertificateTimes], now: float
) -> Iterator[GaugeMetricFamily]:
    """Return the gauges of certificates, whose ``owners`` are "volumes" or "Secrets"."""
    certificates = [one for one in times if one.not_after != math.inf]
    text = f"Time when the first certificate in {owners} expires, in Unix seconds. Absent without certificates."
    first = GaugeMetricFamily(f"{prefix}_first_expiry_timestamp_seconds", text)
    if certificates:
        first.add_metric([], min(one.not_after for one in certificates))
    yield first
    overdue = sum(one.overdue_at <= now < one.not_after for one in certificates)
    text = f"Number of {owners} whose certificate is in the last half of the time between its renewal and its expiry."
    yield GaugeMetricFamily(f"{prefix}_renewals_overdue", text, value=overdue)
    expired = sum(one.not_after <= now for one in certificates)
    text = f"Number of {owners} whose certificate has expired."
    yield GaugeMetricFamily(f"{prefix}_certificates_expired", text, value=expired)
