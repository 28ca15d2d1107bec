"""Prints figures with their budgets as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Figure:
    """A row: the measurement, its budget (``met`` is None without one), the value of other programs, and the method."""

    name: str
    measured: str
    budget: str = "-"
    met: bool | None = None
    reference: str = "-"
    method: str = ""


def print_table(figures: Sequence[Figure]) -> None:
    """Print the table, then the method of each row that has one."""
    print("| figure | measured | budget | | reference |")
    print("| --- | --- | --- | --- | --- |")
    for figure in figures:
        verdict = {True: "met", False: "**missed**", None: ""}[figure.met]
        print(f"| {figure.name} | {figure.measured} | {figure.budget} | {verdict} | {figure.reference} |")
    print()
    for figure in figures:
        if figure.method:
            print(f"- {figure.name}: {figure.method}")
    missed = [figure.name for figure in figures if figure.met is False]
    print(f"\nBudgets missed: {', '.join(missed) if missed else 'none'}")


def percentile(values: Iterable[float], share: float) -> float:
    """Return the percentile by nearest rank; ``share`` is in [0, 1]."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return ``median (min-max)``."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
