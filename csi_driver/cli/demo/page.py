"""What a person sees. Plain ASCII, as a terminal may speak anything; coloured only where there is a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from csi_driver.cli.demo.failure import DemoFailed

_INDENT = "   "


class Page:
    """Writes to standard output, line by line."""

    def __init__(self) -> None:
        self._acts = 0

    def title(self, text: str) -> None:
        click.secho(text, bold=True)

    def plain(self, text: str) -> None:
        click.echo(text)

    def act(self, text: str) -> None:
        """A numbered heading."""
        self._acts += 1
        click.secho(f"\n{self._acts}. {text}", bold=True)

    def line(self, text: str) -> None:
        click.echo(_INDENT + text)

    def good(self, text: str) -> None:
        """A promise that was kept."""
        click.echo(_INDENT + click.style(text, fg="green"))

    def bad(self, text: str) -> None:
        """One that was not."""
        click.echo(_INDENT + click.style(text, fg="red"))

    def code(self, lines: Iterable[str]) -> None:
        """What a person could write or run."""
        for line in lines:
            click.echo(_INDENT + click.style(line, fg="cyan"))

    def fields(self, fields: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Labels with their values below each other."""
        width = max(len(label) for label, _ in fields)
        for label, values in fields:
            for number, value in enumerate(values):
                shown = click.style(f"{'' if number else label:<{width}}", dim=True)
                click.echo(f"{_INDENT}{shown}  {value}")

    def table(self, rows: Sequence[Sequence[str]], right: int) -> None:
        """Columns as wide as their widest cell; column ``right`` holds numbers."""
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [
                f"{cell:>{width}}" if column == right else f"{cell:<{width}}"
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            click.echo((_INDENT + "  ".join(cells)).rstrip())

    def failed(self, failure: DemoFailed) -> None:
        click.secho(f"\nThe demo failed: {failure}", fg="red", bold=True, err=True)
        for log in failure.logs:
            click.echo(
                f"The last lines of {log.program}'s log:" if log.lines else f"{log.program} logged nothing.", err=True
            )
            for line in log.lines:
                click.echo(_INDENT + line, err=True)
        click.echo("Everything it started has ended, and its folder is removed.", err=True)

    def stopped(self) -> None:
        click.secho("\nStopped. Everything it started has ended, and its folder is removed.", err=True)
