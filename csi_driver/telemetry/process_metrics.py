"""Metrics of every component: its version, its clock, and the CPU time and memory of its process."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Info, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from csi_driver import __version__


def register_process_metrics(registry: CollectorRegistry) -> None:
    # In the text format, the creation times of counters and histograms would be further time series.
    disable_created_metrics()  # type: ignore[no-untyped-call]  # has no types
    Info("certmount_build", "Version of the component.", registry=registry).info({"version": __version__})
    ProcessCollector(registry=registry)
    registry.register(_Clock())


class _Clock(Collector):
    """The time of the process. Prometheus compares it with the time of the scrape."""

    def collect(self) -> Iterable[Metric]:
        text = "Time of the component's clock at the scrape, in Unix seconds."
        yield GaugeMetricFamily("certmount_clock_timestamp_seconds", text, value=time.time())
