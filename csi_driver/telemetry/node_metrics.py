"""The Prometheus metrics of the node driver. No label contains a value that the author of a pod chooses."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from csi_driver.core.errors import Reason
from csi_driver.telemetry.expiry_metrics import CertificateTimes, expiry_gauges
from csi_driver.telemetry.outcomes import outcome

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 120)


class NodeMetrics(Collector):
    """Counters, and gauges that are computed from the state of the volumes at each scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._certificates: dict[str, CertificateTimes] = {}
        self._failures: dict[str, Reason] = {}
        self._roots_behind: set[str] = set()
        self._trust_connected = False
        self._renewals_waiting: Callable[[], int] = lambda: 0
        self._calls = Histogram(
            "certmount_node_call_duration_seconds",
            "Duration of the kubelet's calls in seconds by method and reason, which is Ok if the call succeeded, and Cancelled if the kubelet did not wait for the response.",
            ("method", "reason"),
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._renewed = Counter("certmount_node_renewals", "Number of renewed certificates.", registry=registry)
        self._renewals_failed = Counter(
            "certmount_node_renewal_failures", "Number of failed renewals by reason.", ("reason",), registry=registry
        )
        self._reloads = Counter(
            "certmount_node_reload_signals",
            "Number of reloads that volumes requested, by result (sent or failed).",
            ("result",),
            registry=registry,
        )
        self._quarantined = Counter(
            "certmount_node_records_quarantined",
            "Number of volume records that the driver could not read after a restart.",
            registry=registry,
        )
        registry.register(self)

    def called(self, method: str, reason: Reason | None, seconds: float, *, cancelled: bool = False) -> None:
        self._calls.labels(method, outcome(reason, cancelled=cancelled)).observe(seconds)

    def renewed(self) -> None:
        self._renewed.inc()

    def renewal_failed(self, reason: Reason) -> None:
        self._renewals_failed.labels(reason.word).inc()

    def reloaded(self, *, failed: bool) -> None:
        self._reloads.labels("failed" if failed else "sent").inc()

    def record_quarantined(self) -> None:
        self._quarantined.inc()

    def keep(self, volume_id: str, times: CertificateTimes) -> None:
        """Set the times of a volume's certificate."""
        self._certificates[volume_id] = times

    def unhealthy(self, volume_id: str, reason: Reason | None) -> None:
        """Set the reason why a volume's last renewal failed, or None if it succeeded."""
        if reason is None:
            self._failures.pop(volume_id, None)
        else:
            self._failures[volume_id] = reason

    def roots_behind(self, volume_id: str, *, behind: bool) -> None:
        (self._roots_behind.add if behind else self._roots_behind.discard)(volume_id)

    def trust_reported(self, connected: bool) -> None:
        self._trust_connected = connected

    def count_waiting(self, renewals_waiting: Callable[[], int]) -> None:
        """Set the function that returns the number of waiting renewals. The scraper's thread calls it."""
        self._renewals_waiting = renewals_waiting

    def forget(self, volume_id: str) -> None:
        self._roots_behind.discard(volume_id)
        self._certificates.pop(volume_id, None)
        self._failures.pop(volume_id, None)

    def collect(self) -> Iterable[Metric]:
        """Return the gauges. The scraper's thread calls this method, so copy the state first."""
        certificates, failures = list(self._certificates.values()), Tally(list(self._failures.values()))
        yield GaugeMetricFamily("certmount_node_volumes", "Number of published volumes.", value=len(certificates))
        yield from expiry_gauges("certmount_node", "volumes", certificates, time.time())
        text = "1 while the node receives roots and policy changes from the authority, otherwise 0."
        yield GaugeMetricFamily("certmount_node_trust_stream_connected", text, value=self._trust_connected)
        text = "Number of renewals that are due and wait in the request queue."
        yield GaugeMetricFamily("certmount_node_renewals_waiting", text, value=self._renewals_waiting())
        text = "Number of volumes to which new roots could not be written. They delay the next step of a CA rotation."
        yield GaugeMetricFamily("certmount_node_volumes_roots_behind", text, value=len(self._roots_behind))
        text = "Number of volumes whose last renewal failed, by reason."
        family = GaugeMetricFamily("certmount_node_volumes_unhealthy", text, labels=["reason"])
        for reason, count in failures.items():
            family.add_metric([reason.word], count)
        yield family
