"""Draws the panels of the dashboard as SVG, from the answers of Prometheus."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tests.peers.monitoring.dashboard import Panel, Query, Row
from tests.peers.monitoring.prometheus import Series

COLUMN, LINE, GAP = 50, 26, 6  # pixels of the grid
_COLORS = ("#3274d9", "#56a64b", "#e0752d", "#a352cc", "#e02f44", "#1f8a9c", "#b8860b", "#555555")
_LEGEND_LINE, _LEGEND_CHARACTER = 13, 5.6
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.title{font-weight:bold;font-size:12px}.row{font-weight:bold;font-size:14px}"
    ".number{font-size:22px;font-weight:bold}.axis{font-size:9px;fill:#777}.legend{font-size:10px}"
)
_TIME_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_SUFFIXES = {"reqps": "/s", "ops": "/s", "short": ""}

Answer = Sequence[Series]


@dataclass(frozen=True)
class Curve:
    """A line of a diagram."""

    legend: str
    values: Mapping[float, float]


def draw(
    rows: Sequence[Row], panels: Sequence[Panel], answer: Callable[[Query], Answer], start: float, end: float
) -> str:
    """Return the picture of a time span. ``answer`` returns the time series of a query; a panel with a number shows the last value."""
    height = max(panel.y + panel.height for panel in panels) * LINE + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{24 * COLUMN + GAP}" height="{height}">'
    lines = [head, f"<style>{_STYLE}</style>", '<rect width="100%" height="100%" fill="#f4f5f5"/>']
    lines += [f'<text class="row" x="{GAP}" y="{row.y * LINE + 19}">{escape(row.title)}</text>' for row in rows]
    for panel in panels:
        lines.append(f'<g transform="translate({panel.x * COLUMN + GAP},{panel.y * LINE + GAP})">')
        lines += _panel(panel, _curves(panel, answer), start, end)
        lines.append("</g>")
    return "\n".join([*lines, "</svg>", ""])


def _curves(panel: Panel, answer: Callable[[Query], Answer]) -> list[Curve]:
    found = []
    for query in panel.queries:
        for series in sorted(answer(query), key=lambda one: sorted(one.labels.items())):
            values = {time: value for time, value in series.values if math.isfinite(value)}
            if values:
                found.append(Curve(_legend(query.legend, series.labels), values))
    return found


def _legend(template: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def _panel(panel: Panel, curves: Sequence[Curve], start: float, end: float) -> Iterator[str]:
    width, height = panel.width * COLUMN - GAP, panel.height * LINE - GAP
    yield f'<rect width="{width}" height="{height}" rx="3" fill="#fff" stroke="#ddd"/>'
    yield f'<text class="title" x="8" y="16">{escape(panel.title)}</text>'
    if not curves:
        yield '<text x="8" y="50">no data</text>'
    elif panel.is_number:
        yield from _numbers(panel, curves, height)
    else:
        yield from _diagram(panel, curves, (width, height), start, end - start)


def _numbers(panel: Panel, curves: Sequence[Curve], height: int) -> Iterator[str]:
    step = (height - 24) / len(curves)
    for number, curve in enumerate(curves):
        y = 24 + step * (number + 0.5) + 8
        value = formatted(panel.unit, list(curve.values.values())[-1])
        size = "" if len(curves) == 1 else ' style="font-size:15px"'
        yield f'<text class="number" x="8" y="{y:.0f}"{size}>{escape(value)}</text>'
        yield f'<text class="legend" x="{16 + 9 * len(value)}" y="{y:.0f}">{escape(curve.legend)}</text>'


def _diagram(panel: Panel, curves: Sequence[Curve], size: tuple[int, int], start: float, span: float) -> Iterator[str]:
    width, height = size
    legend, legend_lines = _legend_lines(curves, width)
    left, top, right, bottom = 46, 26, width - 10, height - 20 - legend_lines * _LEGEND_LINE
    times = sorted({time for curve in curves for time in curve.values})
    lines = _stacked(curves, times) if panel.stacked else [curve.values for curve in curves]
    maximum = _ceiling(max(value for line in lines for value in line.values()), 2**20 if panel.unit == "bytes" else 1.0)
    for part in range(5):
        y = bottom - (bottom - top) * part / 4
        text = formatted(panel.unit, maximum * part / 4)
        yield f'<path d="M{left} {y:.0f}H{right}" stroke="#eee"/>'
        yield f'<text class="axis" x="{left - 4}" y="{y + 3:.0f}" text-anchor="end">{escape(text)}</text>'
    for part in range(5):
        x, text = left + (right - left) * part / 4, f"{span * part / 4:.0f} s"
        yield f'<text class="axis" x="{x:.0f}" y="{bottom + 12}" text-anchor="middle">{text}</text>'
    for line, color in zip(lines, itertools.cycle(_COLORS), strict=False):
        points = " ".join(
            f"{left + (right - left) * (time - start) / span:.1f},"
            f"{bottom - (bottom - top) * max(value, 0) / maximum:.1f}"
            for time, value in line.items()
        )
        yield f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>'
    yield from _draw_legend(legend, bottom + 28)


def _stacked(curves: Sequence[Curve], times: Sequence[float]) -> list[dict[float, float]]:
    below, lines = dict.fromkeys(times, 0.0), []
    for curve in curves:
        below = {time: below[time] + curve.values.get(time, 0.0) for time in times}
        lines.append(below)
    return lines


def _legend_lines(curves: Sequence[Curve], width: int) -> tuple[list[tuple[str, str, float, int]], int]:
    """Return text, color, x and line of each entry, and the number of lines."""
    entries, x, line = [], 8.0, 0
    for curve, color in zip(curves, itertools.cycle(_COLORS), strict=False):
        needed = 22 + len(curve.legend) * _LEGEND_CHARACTER
        if x > 8 and x + needed > width:
            x, line = 8.0, line + 1
        entries.append((curve.legend, color, x, line))
        x += needed
    return entries, line + 1 if any(curve.legend for curve in curves) else 0


def _draw_legend(entries: Sequence[tuple[str, str, float, int]], top: int) -> Iterator[str]:
    for text, color, x, line in entries:
        if text:
            y = top + line * _LEGEND_LINE
            yield f'<path d="M{x:.0f} {y - 4}h10" stroke="{color}" stroke-width="3"/>'
            yield f'<text class="legend" x="{x + 14:.0f}" y="{y}">{escape(text)}</text>'


def _ceiling(value: float, unit: float) -> float:
    """Return the next of 1, 2, 4 and 8 times a power of ten of the unit."""
    if value <= 0:
        return unit
    power = unit * 10.0 ** math.floor(math.log10(value / unit))
    return next(factor * power for factor in (1, 2, 4, 8, 10) if factor * power >= value)


def formatted(unit: str, value: float) -> str:
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    for units, name in ((_TIME_UNITS, "s"), (_BYTE_UNITS, "bytes")):
        if unit == name:
            size, symbol = next((one for one in units if abs(value) >= one[0]), units[-1])
            return (
                f"{value / size:,.0f} {symbol}"
                if abs(value) >= 100 * size
                else f"{value / size:.3g} {symbol}"
                if value
                else "0"
            )
    return f"{value:.4g}{_SUFFIXES[unit]}"
