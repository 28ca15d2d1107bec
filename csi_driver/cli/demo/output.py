"""The demo's output: plain ASCII, with colors only on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from csi_driver.cli.demo.errors import DemoError

_INDENT = "   "
_CLEANED_UP = "All processes of the demo have ended, and its directory is deleted."


class Output:
    """Writes to standard output, line by line, and counts the steps."""

    def __init__(self) -> None:
        self._steps = 0

    def text(self, text: str, *, bold: bool = False) -> None:
        click.secho(text, bold=bold)

    def step(self, text: str) -> None:
        self._steps += 1
        click.secho(f"\n{self._steps}. {text}", bold=True)

    def line(self, text: str, color: str | None = None) -> None:
        click.echo(_INDENT + click.style(text, fg=color))

    def success(self, text: str) -> None:
        self.line(text, "green")

    def code(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.line(line, "cyan")

    def fields(self, fields: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Write each label with its values, one value per line."""
        width = max(len(label) for label, _ in fields)
        for label, values in fields:
            for number, value in enumerate(values):
                styled = click.style(f"{'' if number else label:<{width}}", dim=True)
                click.echo(f"{_INDENT}{styled}  {value}")

    def table(self, rows: Sequence[Sequence[str]], right: int) -> None:
        """Write aligned columns; column ``right`` is right-aligned."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [
                cell.rjust(width) if column == right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self.line("  ".join(cells).rstrip())

    def failed(self, error: DemoError) -> None:
        click.secho(f"\nThe demo failed: {error}", fg="red", bold=True, err=True)
        click.echo("\n".join([*error.logs, _CLEANED_UP]), err=True)

    def stopped(self) -> None:
        click.secho(f"\nStopped. {_CLEANED_UP}", err=True)
