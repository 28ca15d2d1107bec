"""The panels of deploy/monitoring/dashboard.json and their queries."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.support.documentation import ROOT

FILE = ROOT / "deploy/monitoring/dashboard.json"


@dataclass(frozen=True)
class Query:
    """A query of a panel, in which the variables of Grafana have values."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A panel: a number, or a diagram of time series."""

    title: str
    description: str
    is_number: bool
    unit: str
    stacked: bool
    queries: tuple[Query, ...]
    x: int  # in the grid of 24 columns
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Row:
    """The title above panels."""

    title: str
    y: int


def read_dashboard(rate_interval: str) -> tuple[list[Row], list[Panel]]:
    """Return the rows and the panels; ``rate_interval`` is the value of Grafana's variable, such as ``1m``."""
    rows, panels = [], []
    for entry in json.loads(FILE.read_text())["panels"]:
        position = entry["gridPos"]
        if entry["type"] == "row":
            rows.append(Row(entry["title"], position["y"]))
            continue
        defaults = entry["fieldConfig"]["defaults"]
        queries = tuple(
            Query(target["expr"].replace("$__rate_interval", rate_interval), target["legendFormat"])
            for target in entry["targets"]
        )
        panels.append(
            Panel(
                entry["title"],
                entry["description"],
                entry["type"] == "stat",
                defaults["unit"],
                "stacking" in defaults.get("custom", {}),
                queries,
                position["x"],
                position["y"],
                position["w"],
                position["h"],
            )
        )
    return rows, panels
