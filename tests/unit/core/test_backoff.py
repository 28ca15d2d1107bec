"""Exponential backoff."""

from __future__ import annotations

import pytest

from csi_driver.core.backoff import Backoff


def test_delay_doubles_until_the_cap() -> None:
    backoff = Backoff(1, 15)
    assert [backoff.delay_s(failures) for failures in (1, 2, 3, 4, 5, 10_000)] == [1, 2, 4, 8, 15, 15]


def test_factor_changes_the_growth() -> None:
    assert Backoff(0.5, 60, factor=4).delay_s(3) == 8


@pytest.mark.parametrize("rng, expected", [(0.0, 5.0), (0.5, 10.0), (0.75, 12.5)])
def test_jitter_spreads_the_delay_around_the_computed_value(rng: float, expected: float) -> None:
    assert Backoff(10, 10, jitter=0.5).delay_s(7, rng) == expected
