"""The alerts and the metrics in the opinion of promtool."""

from __future__ import annotations

import subprocess

import pytest
from prometheus_client import generate_latest

from tests.support.documentation import ROOT
from tests.support.metric_pages import registries
from tests.support.requirements import require_program

pytestmark = pytest.mark.peers

METRICS = registries()


def test_rules_are_valid() -> None:
    _promtool("check", "rules", "--lint=all", "--lint-fatal", "deploy/monitoring/rules.yaml")


def test_alerts_fire_when_they_should() -> None:
    _promtool("test", "rules", "tests/peers/monitoring/rules.test.yaml")


@pytest.mark.parametrize("component", METRICS)
def test_metrics_have_good_names_and_help(component: str) -> None:
    _promtool("check", "metrics", "--lint=all", page=generate_latest(METRICS[component]).decode())


def _promtool(*arguments: str, page: str = "") -> None:
    command = [require_program("promtool"), *arguments]
    ran = subprocess.run(command, input=page, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
