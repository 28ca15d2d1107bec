"""deploy/monitoring/rules.yaml, its texts, and the pages that it refers to."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.support.documentation import ROOT, anchors
from tests.support.metric_pages import declared, family

GROUPS = yaml.safe_load((ROOT / "deploy/monitoring/rules.yaml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
NAMES = [rule["alert"] for rule in RULES]
PAGE = (ROOT / "docs/metrics.md").read_text()


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_alert_says_what_happened_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"] in ({"severity": "warning"}, {"severity": "critical"})
    summary, description, runbook = (rule["annotations"][each] for each in ("summary", "description", "runbook"))
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert re.search(r"\.(?:\{\{ end \}\})?$", summary)
    assert len(summary) < 120
    assert re.search(r"\b([Rr]un|[Rr]ead|verify|delete|Look up|lists|[Rr]estart)\b", description)
    page, anchor = runbook.split("#")
    assert anchor in anchors((ROOT / page).read_text())


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_alert_uses_existing_metrics(rule: dict[str, Any]) -> None:
    known = {metric.name for metrics in declared().values() for metric in metrics}
    used = {family(name) for name in re.findall(r"\bcertmount_[a-z_]+", rule["expr"])}
    assert used <= known
    assert used or "up{" in rule["expr"]


def test_page_lists_the_alerts() -> None:
    rows = re.findall(r"^\| `(Certmount\w+)` \| (\w+) \|", PAGE, flags=re.MULTILINE)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in RULES]


def test_every_alert_has_a_unit_test() -> None:
    """Promtool runs them: each alert fires in one of them, and none while everything is healthy."""
    tests = yaml.safe_load((ROOT / "tests/peers/monitoring/rules.test.yaml").read_text())["tests"]
    samples = [sample for test in tests for each in test["promql_expr_test"] for sample in each["exp_samples"]]
    firing = {re.search(r'alertname="(\w+)"', sample["labels"]) for sample in samples}
    assert {match[1] for match in firing if match} == set(NAMES)
