"""The metrics of the pods in a cluster are those that the documentation lists."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e import host
from tests.support.metric_pages import documented, undocumented

# Those whose labels have no value yet are absent.
COMPONENTS = {"certmount-node": "Node driver", "certmount-authority": "Authority"}


@pytest.mark.parametrize("workload", COMPONENTS)
def test_pod_has_the_documented_metrics(workload: str) -> None:
    pod, *_ = host.pods_of(workload)
    families = list(text_string_to_metric_families(host.metrics_page(pod)))
    series = [{"__name__": sample.name, **sample.labels} for family in families for sample in family.samples]
    assert undocumented(COMPONENTS[workload], series) == []
    without_labels = {metric.name for metric in documented()[COMPONENTS[workload]] if not metric.labels}
    names = {each["__name__"].removesuffix("_count") for each in series}
    assert without_labels - names <= {"certmount_node_first_expiry_timestamp_seconds"}
