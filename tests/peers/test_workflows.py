"""The GitHub workflows are valid, and contain nothing that can change without a commit."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.requirements import require_program

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
_PREFIX = "Programming Language :: Python :: 3."


def _workflow(file: Path) -> dict[str, Any]:
    # A loader for YAML 1.2 reads the key "on" as text.
    return dict(yaml.load(file.read_text(), yaml.BaseLoader))  # noqa: S506  # makes only text, lists and mappings


@pytest.mark.peers("actionlint")
def test_actionlint_has_no_complaint() -> None:
    """It also checks the shell scripts, if the machine has shellcheck."""
    done = subprocess.run(
        [require_program("actionlint"), *FILES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_actions_are_pinned_by_commit(file: Path) -> None:
    for line in re.findall(r"^.*\buses: .*$", file.read_text(), re.MULTILINE):
        assert re.search(r"uses: (\./[\w./-]+|[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+)$", line), line


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_job_names_its_permissions(file: Path) -> None:
    """A job without the key would have those of the workflow, which are none."""
    workflow = _workflow(file)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"]["contents"] in ("read", "write"), name
        assert ("write" in job["permissions"]["contents"]) == (name == "release")


def test_workflow_tests_the_supported_pythons() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    supported = [f"3.{one.removeprefix(_PREFIX)}" for one in classifiers if one.startswith(_PREFIX)]
    tested = _workflow(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == supported
