"""What every test is run with: the hypothesis profiles, and the markers that say what a test needs of the machine."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.support.requirements import require_program, require_root

# No deadline: a slow machine is no fault of the code. Too-slow generation is one of the machine as well.
settings.register_profile("default", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples on every run, so that a change alone can turn CI red.
settings.register_profile("ci", settings.get_profile("default"), max_examples=100, derandomize=True, print_blob=True)
settings.register_profile("long", settings.get_profile("default"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``@pytest.mark.root`` needs root; ``@pytest.mark.peers("openssl")`` needs the programs it names."""
    if item.get_closest_marker("root"):
        require_root()
    for marker in item.iter_markers("peers"):
        for program in marker.args:
            require_program(program)
