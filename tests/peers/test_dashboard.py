"""Every query of the Grafana dashboard returns data from a Prometheus that scrapes a running certmount, and all that it scrapes is documented."""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.peers.monitoring.dashboard import Panel, Query, read_dashboard
from tests.peers.monitoring.drawing import draw
from tests.peers.monitoring.prometheus import SCRAPE_INTERVAL_S, Series
from tests.peers.monitoring.world import Monitored, monitored
from tests.support.documentation import ROOT
from tests.support.metric_pages import declared, family, undocumented
from tests.support.requirements import require_program

pytestmark = [pytest.mark.peers, pytest.mark.timeout(240)]

_RATE_INTERVAL = "15s"
_SCRAPES = 120
ROWS, PANELS = read_dashboard(_RATE_INTERVAL)
COMPONENTS = {
    "certmount-node": "Node driver",
    "certmount-authority": "Authority",
    "certmount-secrets": "Secrets controller",
}
# What the world of the test causes: the values of labels that have a positive value.
EXPECTED = {
    "Publish calls by reason": {"Ok"},
    "Volumes with failing renewals": {"ServiceAccountDenied"},
    "Issuance requests by reason": {"Ok", "NameNotAllowed"},
    "ACME orders": {"failed"},
    "Secrets by state": {"ready", "failed"},
    "Memory": set(COMPONENTS),
}


@dataclass(frozen=True)
class Run:
    """What Prometheus answered."""

    answers: dict[Query, list[Series]]
    series: dict[str, list[dict[str, str]]]  # by job
    rule_problems: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    require_program("prometheus")
    return asyncio.run(_run(tmp_path_factory.mktemp("monitoring")))


async def _run(directory: Path) -> Run:
    async with monitored(directory) as world:
        await world.use_everything()
        run = await asyncio.to_thread(_ask, world)
        for _ in range(_SCRAPES):  # not forever: the tests then name the panels without data
            if _is_complete(run):
                break
            await asyncio.sleep(SCRAPE_INTERVAL_S)
            run = await asyncio.to_thread(_ask, world)
        return run


def _ask(world: Monitored) -> Run:
    answers = {query: world.prometheus.query(query.expression) for panel in PANELS for query in panel.queries}
    series = {job: world.prometheus.series(job) for job in COMPONENTS}
    return Run(answers, series, world.prometheus.rule_problems())


def _is_complete(run: Run) -> bool:
    positive = _positive(run)
    return all(map(_has_data, run.answers.values())) and all(
        expected <= positive[title] for title, expected in EXPECTED.items()
    )


def _has_data(answer: list[Series]) -> bool:
    return any(math.isfinite(value) for series in answer for _, value in series.values)


def _positive(run: Run) -> dict[str, set[str]]:
    """Return the labels of the time series with positive values, by panel."""
    return {
        panel.title: {
            "".join(series.labels.get(name, "") for name in ("reason", "state", "result", "job"))
            for query in panel.queries
            for series in run.answers[query]
            if series.values[0][1] > 0
        }
        for panel in PANELS
    }


@pytest.mark.parametrize("panel", PANELS, ids=[panel.title for panel in PANELS])
def test_panel_shows_data(run: Run, panel: Panel) -> None:
    for query in panel.queries:
        assert _has_data(run.answers[query]), query.expression


@pytest.mark.parametrize("title", EXPECTED)
def test_panel_shows_what_happened(run: Run, title: str) -> None:
    assert _positive(run)[title] >= EXPECTED[title]


@pytest.mark.parametrize("job", COMPONENTS)
def test_everything_that_prometheus_scrapes_is_documented(run: Run, job: str) -> None:
    scraped = [labels for labels in run.series[job] if re.match("certmount_|process_", labels["__name__"])]
    assert len(scraped) > 15
    assert undocumented(COMPONENTS[job], scraped) == []


def test_rules_are_evaluated_without_a_problem(run: Run) -> None:
    assert run.rule_problems == []


def test_dashboard_uses_existing_metrics() -> None:
    known = {metric.name for metrics in declared().values() for metric in metrics}
    text = " ".join(query.expression for panel in PANELS for query in panel.queries)
    used = {family(name) for name in re.findall(r"\b(?:certmount|process)_[a-z_]+", text)}
    assert used <= known


def test_panels_fill_the_grid_without_overlapping() -> None:
    cells = [
        (column, line)
        for panel in PANELS
        for column in range(panel.x, panel.x + panel.width)
        for line in range(panel.y, panel.y + panel.height)
    ]
    assert len(cells) == len(set(cells))
    assert {column for column, _ in cells} == set(range(24))
    assert all(panel.description.endswith(".") for panel in PANELS)


def test_drawing_has_all_panels(run: Run) -> None:
    start = min(series.values[0][0] for answer in run.answers.values() for series in answer)
    _check_picture(draw(ROWS, PANELS, run.answers.__getitem__, start, start + 60))


def test_picture_in_the_documentation_has_all_panels() -> None:
    """After a change of the dashboard, run scripts/draw-dashboard."""
    _check_picture((ROOT / "docs/images/dashboard.svg").read_text())


def _check_picture(picture: str) -> None:
    titles = re.findall(r'class="title"[^>]*>([^<]+)<', picture)
    assert titles == [panel.title for panel in PANELS]
    assert "no data" not in picture
