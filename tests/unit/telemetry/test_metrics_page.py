"""docs/metrics.md and the metrics that the components register."""

from __future__ import annotations

import re

import pytest

from csi_driver.authority.ca.rotation import RotationPhase
from csi_driver.telemetry.secrets_metrics import SecretState
from tests.support.metric_pages import DocumentedMetric, declared, documented, label_values

COMPONENTS = ("All components", "Node driver", "Authority", "Secrets controller")
METRICS = [metric for metrics in declared().values() for metric in metrics]


@pytest.mark.parametrize("component", COMPONENTS)
def test_page_lists_every_metric_with_its_type_labels_and_help(component: str) -> None:
    assert documented()[component] == sorted(declared()[component])


def test_page_has_no_other_tables_of_metrics() -> None:
    assert tuple(documented()) == COMPONENTS


def test_page_lists_every_label() -> None:
    assert label_values().keys() == {label for metric in METRICS for label in metric.labels}


def test_page_lists_the_values_of_enumerations() -> None:
    values = label_values()
    assert values["phase"] == tuple(phase.value for phase in RotationPhase)
    assert values["state"] == tuple(state.value for state in SecretState)


@pytest.mark.parametrize("metric", METRICS, ids=[metric.name for metric in METRICS])
def test_names_follow_the_conventions_of_prometheus(metric: DocumentedMetric) -> None:
    """Base units, the unit in the plural at the end, and the suffixes that tools expect."""
    assert re.fullmatch(r"(certmount|process)_[a-z_]+[a-z]", metric.name)
    assert metric.name.endswith("_total") == (metric.type == "counter")
    assert metric.name.endswith("_info") == (metric.type == "info")
    assert metric.type != "histogram" or metric.name.endswith("_duration_seconds")
    assert not re.search(r"_(second|minutes|ms|millis|hours|days|kib|mib|count|sum|bucket)(_|$)", metric.name)
    assert metric.meaning.endswith(".")
