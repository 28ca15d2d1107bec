"""Hypothesis profiles, markers for what a test needs from the machine, and loggers that no test changes for later ones."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.support.requirements import require_program, require_root

# No deadline and no check for slow generation, because both depend on the machine.
settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples in every run, so that only a change can make CI fail.
settings.register_profile("ci", settings.get_profile("default"), max_examples=100, derandomize=True, print_blob=True)
settings.register_profile("long", settings.get_profile("default"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests with ``@pytest.mark.root`` without root, and with ``@pytest.mark.peers("openssl")`` without the programs."""
    if item.get_closest_marker("root"):
        require_root()
    for marker in item.iter_markers("peers"):
        for program in marker.args:
            require_program(program)


@pytest.fixture(autouse=True)
def default_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that a test runs in its own process configures the loggers, and would cache them for all later tests."""
    original = structlog.configure

    @functools.wraps(original)
    def configure(**options: object) -> None:
        original(**{**options, "cache_logger_on_first_use": False})  # type: ignore[arg-type]

    monkeypatch.setattr(structlog, "configure", configure)
    yield
    structlog.reset_defaults()
