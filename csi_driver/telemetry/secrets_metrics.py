"""Metrics of the Secrets controller."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterable
from enum import Enum, unique

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from csi_driver.core.errors import Reason
from csi_driver.telemetry.expiry_metrics import CertificateTimes, expiry_gauges


@unique
class SecretState(Enum):
    """The state of a managed Secret."""

    READY = "ready"
    PENDING = "pending"
    FAILED = "failed"


class SecretsMetrics(Collector):
    """Counters, and gauges that are computed from the managed Secrets at each scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.leader = False
        self._trust_connected = False
        self._states: dict[str, SecretState] = {}
        self._reasons: dict[str, Reason] = {}
        self._certificates: dict[str, CertificateTimes] = {}
        self._issued = Counter("certmount_secrets_issued", "Number of certificates issued.", registry=registry)
        self._failures = Counter(
            "certmount_secrets_failures", "Number of failed attempts by reason.", ("reason",), registry=registry
        )
        self._events_written = Counter(
            "certmount_secrets_events_written", "Number of events written, including repeats.", registry=registry
        )
        self._events_dropped = Counter(
            "certmount_secrets_events_dropped",
            "Number of events not written by cause: object (too many of one object), share (too many of one namespace), "
            "rejected (by the API server) or late.",
            ("cause",),
            registry=registry,
        )
        registry.register(self)

    def issued(self) -> None:
        self._issued.inc()

    def ready(self, secret: str, times: CertificateTimes) -> None:
        """The Secret has a valid certificate."""
        self._states[secret], self._certificates[secret] = SecretState.READY, times
        self._reasons.pop(secret, None)

    def failed(self, secret: str, reason: Reason, *, pending: bool) -> None:
        self._states[secret] = SecretState.PENDING if pending else SecretState.FAILED
        self._reasons[secret] = reason
        self._failures.labels(reason.word).inc()

    def forget(self, secret: str) -> None:
        for values in (self._states, self._reasons, self._certificates):
            values.pop(secret, None)

    def clear(self) -> None:
        """Forget all Secrets, because another replica works on them now."""
        for values in (self._states, self._reasons, self._certificates):
            values.clear()

    def trust_reported(self, connected: bool) -> None:
        self._trust_connected = connected

    def event_written(self) -> None:
        self._events_written.inc()

    def event_dropped(self, cause: str) -> None:
        self._events_dropped.labels(cause).inc()

    def collect(self) -> Iterable[Metric]:
        """Return the gauges. The scraper's thread calls this method, so copy the state first."""
        states, reasons = Tally(list(self._states.values())), Tally(list(self._reasons.values()))
        certificates = list(self._certificates.values())
        family = GaugeMetricFamily(
            "certmount_secrets_certificates", "Number of managed Secrets by state.", labels=["state"]
        )
        for state in SecretState:
            family.add_metric([state.value], states[state])
        yield family
        text = "Number of Secrets whose last attempt failed, by reason."
        family = GaugeMetricFamily("certmount_secrets_failing", text, labels=["reason"])
        for reason, count in reasons.items():
            family.add_metric([reason.word], count)
        yield family
        yield from expiry_gauges("certmount_secrets", "Secrets", certificates, time.time())
        yield GaugeMetricFamily(
            "certmount_secrets_leader", "1 on the replica that works, 0 on the others.", value=float(self.leader)
        )
        text = "1 while the replica receives roots from the authority, otherwise 0. Only the leader does."
        yield GaugeMetricFamily("certmount_secrets_trust_stream_connected", text, value=float(self._trust_connected))
