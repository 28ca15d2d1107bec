"""What the authority counts of its dealings with the cluster, in Prometheus' terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class ClusterMetrics(Collector):
    """Events on pods, and for how long the cluster could not be followed, which is read at the time of the scrape."""

    def __init__(self, registry: CollectorRegistry, failing_s: Callable[[], Mapping[str, float]]) -> None:
        """``failing_s``: seconds by resource, 0 while it is followed; called from the scraper's thread."""
        self._failing_s = failing_s
        self.events_written = Counter(
            "certmount_events_written", "Events written on pods, repeated ones included.", registry=registry
        )
        self.events_dropped = Counter(
            "certmount_events_dropped",
            "Events that were not written: too many of a pod, too many in all, refused by the API server, or too late.",
            ("why",),
            registry=registry,
        )
        for why in ("pod", "full", "refused", "late"):
            self.events_dropped.labels(why)
        registry.register(self)

    def event_dropped(self, why: str) -> None:
        """An event was not written: "pod", "full", "refused" or "late"."""
        self.events_dropped.labels(why).inc()

    def collect(self) -> Iterable[Metric]:
        """The gauge."""
        text = "For how long a resource of the cluster could not be followed; nothing is issued beyond 60 seconds."
        family = GaugeMetricFamily("certmount_watch_failing_seconds", text, labels=["resource"])
        for resource, seconds in self._failing_s().items():
            family.add_metric([resource], seconds)
        yield family
