"""Prometheus metrics of the authority's work with the Kubernetes API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class ClusterMetrics(Collector):
    """Counters of pod events, and a gauge of failing watches that is read at each scrape."""

    def __init__(self, registry: CollectorRegistry, failing_s: Callable[[], Mapping[str, float]]) -> None:
        """``failing_s`` returns seconds by resource, 0 for a current watch. The scraper's thread calls it."""
        self._failing_s = failing_s
        self.events_written = Counter(
            "certmount_events_written", "Number of pod events written, including repeats.", registry=registry
        )
        self.events_dropped = Counter(
            "certmount_events_dropped",
            "Number of pod events not written by cause: pod (too many of one pod), full (too many in total), "
            "rejected (by the API server) or late.",
            ("cause",),
            registry=registry,
        )
        for cause in ("pod", "full", "rejected", "late"):
            self.events_dropped.labels(cause)
        registry.register(self)

    def event_dropped(self, cause: str) -> None:
        """Count an event that was not written: "pod", "full", "rejected" or "late"."""
        self.events_dropped.labels(cause).inc()

    def collect(self) -> Iterable[Metric]:
        """Return the gauge of failing watches."""
        text = (
            "Seconds for which a resource could not be watched. Beyond 60 seconds the authority issues no certificates."
        )
        family = GaugeMetricFamily("certmount_watch_failing_seconds", text, labels=["resource"])
        for resource, seconds in self._failing_s().items():
            family.add_metric([resource], seconds)
        yield family
