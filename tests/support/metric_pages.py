"""The metrics of each component as its registry declares them, and the rows of docs/metrics.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from csi_driver.core.errors import REASONS
from csi_driver.telemetry.authority_metrics import AuthorityMetrics, ClusterMetrics
from csi_driver.telemetry.node_metrics import NodeMetrics
from csi_driver.telemetry.process_metrics import register_process_metrics
from csi_driver.telemetry.secrets_metrics import SecretsMetrics

PAGE = Path("docs/metrics.md")
_SUFFIXES = {"counter": "_total", "info": "_info"}
_SAMPLES = re.compile(r"_(bucket|count|sum)$")


class DocumentedMetric(NamedTuple):
    """One row of the page."""

    name: str
    type: str
    labels: tuple[str, ...]
    meaning: str


def registries() -> dict[str, CollectorRegistry]:
    """Return a registry for each component, with all its metrics."""
    found = {name: CollectorRegistry() for name in ("All components", "Node driver", "Authority", "Secrets controller")}
    register_process_metrics(found["All components"])
    NodeMetrics(found["Node driver"])
    AuthorityMetrics(found["Authority"])
    ClusterMetrics(found["Authority"], dict)
    SecretsMetrics(found["Secrets controller"])
    return found


def declared() -> dict[str, list[DocumentedMetric]]:
    """Return the metrics that the components register, by component."""
    return {component: _of_registry(registry) for component, registry in registries().items()}


def documented() -> dict[str, list[DocumentedMetric]]:
    """Return the rows of the page by component."""
    found: dict[str, list[DocumentedMetric]] = {}
    component = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            component = line.removeprefix("## ")
        elif row := re.fullmatch(r"\| `([a-z_]+)` \| (\w+) \| (.*?) ?\| (.+) \|", line):
            name, kind, labels, meaning = row.groups()
            found.setdefault(component, []).append(DocumentedMetric(name, kind, _words(labels), meaning))
    return found


def label_values() -> dict[str, tuple[str, ...]]:
    """Return the values that the page lists for each label."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## Labels\n")
    return {name: _words(values) for name, values in re.findall(r"^\| `(\w+)` \| (.+?) \|$", section, re.MULTILINE)}


def undocumented(component: str, series: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return those of a component's time series that the page does not list with all their labels and values.

    A time series is its labels; ``__name__`` is its name, as in Prometheus.
    """
    pages, values = documented(), label_values()
    labels = {metric.name: set(metric.labels) for metric in (*pages["All components"], *pages[component])}
    found = []
    for each in series:
        own = {name: value for name, value in each.items() if name not in ("__name__", "job", "instance", "le")}
        listed = all(_is_listed(name, value, values) for name, value in own.items())
        if set(own) != labels.get(family(each["__name__"])) or not listed:
            found.append(each)
    return found


def family(sample: str) -> str:
    """Return the name that the page lists for a time series, which for histograms is without its suffix."""
    return _SAMPLES.sub("", sample)


def _is_listed(label: str, value: str, values: Mapping[str, tuple[str, ...]]) -> bool:
    if label == "reason":
        return value == "Ok" or value in REASONS
    return value in values.get(label, ()) or label in ("issuer", "version", "resource")


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", text))


def _of_registry(registry: CollectorRegistry) -> list[DocumentedMetric]:
    found = []
    for collector in registry._collector_to_names:
        if isinstance(collector, MetricWrapperBase):
            kind, name = str(collector._type), collector._name
            suffix = _SUFFIXES.get(kind, "")
            labels = tuple(collector._labelnames) or (("version",) if kind == "info" else ())
            found.append(DocumentedMetric(f"{name}{suffix}", kind, labels, collector._documentation))
            continue
        for each in collector.collect():
            suffix = _SUFFIXES.get(each.type, "")
            labels = tuple(getattr(each, "_labelnames", ()))
            found.append(DocumentedMetric(f"{each.name}{suffix}", each.type, labels, each.documentation))
    return found
