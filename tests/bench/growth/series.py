"""The cost of one item at several sizes. The limit: it stays within a factor of what it is at the cheapest smaller size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from tests.bench.table import Figure

_FACTOR = 2.0
"""What a constant cost may vary by on a busy machine. A quadratic total would exceed it from one size to the next."""
_ROUNDS = 3


def growth(name: str, costs: Mapping[int, float], unit: str, method: str, *, factor: float = _FACTOR) -> Figure:
    """Return the row of a series: cost per item by increasing size, and the worst ratio to the cheapest smaller size."""
    values = list(costs.values())
    worst = max(value / min(values[:place]) for place, value in enumerate(values) if place)
    measured = ", ".join(f"{size:,}: {cost:.1f}" for size, cost in costs.items())
    return Figure(name, f"{worst:.2f} x ({measured} {unit})", f"{factor:g} x", worst <= factor, method=method)


def fastest_us(call: Callable[[], int]) -> float:
    """Return the CPU time per item of the fastest of some rounds. ``call`` returns its number of items."""
    times = []
    for _ in range(_ROUNDS):
        start = time.process_time()
        items = call()
        times.append((time.process_time() - start) / items * 1e6)
    return min(times)
