"""A Prometheus process, and what it answers."""

from __future__ import annotations

import contextlib
import json
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.peers.processes import running
from tests.support.documentation import ROOT
from tests.support.ports import free_port
from tests.support.requirements import require_program

SCRAPE_INTERVAL_S = 1


@dataclass(frozen=True)
class Series:
    """A time series: its labels, and its values by time."""

    labels: Mapping[str, str]
    values: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Prometheus:
    """The HTTP API of a Prometheus."""

    url: str

    def query(self, expression: str) -> list[Series]:
        """Return the current values."""
        found = self._get("query", query=expression)["result"]
        return [Series(each["metric"], (_point(each["value"]),)) for each in found]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        times = {"start": str(start), "end": str(end), "step": str(step)}
        found = self._get("query_range", query=expression, **times)["result"]
        return [Series(each["metric"], tuple(map(_point, each["values"]))) for each in found]

    def series(self, job: str) -> list[dict[str, str]]:
        """Return the labels of all time series of a job."""
        found: list[dict[str, str]] = self._get("series", **{"match[]": f'{{job="{job}"}}'})
        return found

    def rule_problems(self) -> list[str]:
        groups = self._get("rules")["groups"]
        return [
            f"{rule['name']}: {rule['lastError']}" for group in groups for rule in group["rules"] if "lastError" in rule
        ]

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return json.load(response)["data"]


def _point(value: tuple[float, str]) -> tuple[float, float]:
    return value[0], float(value[1])


@contextlib.asynccontextmanager
async def running_prometheus(directory: Path, targets: Mapping[str, str]) -> AsyncIterator[Prometheus]:
    """Run a Prometheus with the rules of deploy/monitoring/ that scrapes the targets, which are addresses by job."""
    program, port = require_program("prometheus"), free_port()
    configuration = {
        "global": {"scrape_interval": f"{SCRAPE_INTERVAL_S}s", "evaluation_interval": f"{SCRAPE_INTERVAL_S}s"},
        "rule_files": [str(ROOT / "deploy/monitoring/rules.yaml")],
        "scrape_configs": [{"job_name": job, "static_configs": [{"targets": [at]}]} for job, at in targets.items()],
    }
    file = directory / "prometheus.yaml"
    file.write_text(json.dumps(configuration))
    arguments = [
        program,
        f"--config.file={file}",
        f"--storage.tsdb.path={directory}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    async with running(arguments, directory / "prometheus.log", port):
        yield Prometheus(f"http://127.0.0.1:{port}")
