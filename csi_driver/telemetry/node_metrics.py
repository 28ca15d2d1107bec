"""What the node driver counts, in Prometheus' terms. No label holds a name that a pod's author chooses."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from csi_driver.core.errors import Reason

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 120)


class NodeMetrics(Collector):
    """The driver's own numbers. Gauges are derived from the volumes at the time of the scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._not_after: dict[str, float] = {}
        self._unhealthy: dict[str, Reason] = {}
        self._roots_behind: set[str] = set()
        self._waiting: Callable[[], int] = lambda: 0
        self._calls = Histogram(
            "certmount_node_call_seconds",
            "Calls of the kubelet by method and reason of failure (empty: none).",
            ("method", "reason"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._renewals = Counter("certmount_node_renewals", "Certificates renewed in place.", registry=registry)
        self._failures = Counter(
            "certmount_node_renewal_failures", "Renewals that failed, by reason.", ("reason",), registry=registry
        )
        self._quarantined = Counter(
            "certmount_node_records_quarantined",
            "Volume records that did not parse after a restart.",
            registry=registry,
        )
        registry.register(self)

    def called(self, method: str, reason: Reason | None, seconds: float) -> None:
        """A call of the kubelet ended."""
        self._calls.labels(method, reason.word if reason else "").observe(seconds)

    def renewed(self) -> None:
        """A certificate was renewed in place."""
        self._renewals.inc()

    def renewal_failed(self, reason: Reason) -> None:
        """A renewal failed; it will be tried again."""
        self._failures.labels(reason.word).inc()

    def record_quarantined(self) -> None:
        """A volume's record did not parse."""
        self._quarantined.inc()

    def keep(self, volume_id: str, not_after: float) -> None:
        """The volume holds a certificate until then (unix seconds)."""
        self._not_after[volume_id] = not_after

    def unhealthy(self, volume_id: str, reason: Reason | None) -> None:
        """The volume's last renewal failed; None: it did not."""
        if reason is None:
            self._unhealthy.pop(volume_id, None)
        else:
            self._unhealthy[volume_id] = reason

    def roots_behind(self, volume_id: str, *, behind: bool) -> None:
        """Newer roots could not be written to the volume, or were."""
        (self._roots_behind.add if behind else self._roots_behind.discard)(volume_id)

    def count_waiting(self, waiting: Callable[[], int]) -> None:
        """Has ``waiting`` called at each scrape, from another thread: volumes whose moment of renewal has come."""
        self._waiting = waiting

    def forget(self, volume_id: str) -> None:
        """The volume is gone."""
        self._roots_behind.discard(volume_id)
        self._not_after.pop(volume_id, None)
        self._unhealthy.pop(volume_id, None)

    def collect(self) -> Iterable[Metric]:
        """The gauges. Called from the scraper's thread: copies first, as the loop goes on."""
        not_after, unhealthy = list(self._not_after.values()), Tally(list(self._unhealthy.values()))
        yield GaugeMetricFamily("certmount_node_volumes", "Volumes published on this node.", value=len(not_after))
        if not_after:
            text = "The moment at which the first certificate of this node ends, in unix seconds."
            yield GaugeMetricFamily("certmount_node_first_expiry_timestamp_seconds", text, value=min(not_after))
        text = "Volumes whose moment of renewal has come and that wait for their turn."
        yield GaugeMetricFamily("certmount_node_renewals_waiting", text, value=self._waiting())
        text = "Volumes to which newer roots could not be written; a change of the CA waits for them."
        yield GaugeMetricFamily("certmount_node_volumes_roots_behind", text, value=len(self._roots_behind))
        family = GaugeMetricFamily(
            "certmount_node_volumes_unhealthy", "Volumes whose last renewal failed, by reason.", labels=["reason"]
        )
        for reason, count in unhealthy.items():
            family.add_metric([reason.word], count)
        yield family
