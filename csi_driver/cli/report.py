"""The output of commands for people and scripts: tables and colors only on a terminal."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import click

from csi_driver.cli.common import errors_for_users
from csi_driver.core.errors import printable
from csi_driver.core.texts import shortened

_MAX_CELL = 50
_T = TypeVar("_T")
Row = Sequence[str]

output_option = click.option(
    "--output",
    "-o",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json is stable for scripts, see docs/commands.md.",
)


def cluster_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options ``--context`` and ``--namespace`` of commands that read a cluster."""
    function = click.option("--context", help="The context of your kubeconfig. Default: the current one.")(function)
    return click.option(
        "--namespace", "-n", default="certmount", show_default=True, help="The namespace of certmount."
    )(function)


def with_cluster(context: str | None, action: Callable[[Any], Awaitable[_T]]) -> _T:
    """Run an action with an ObjectReader of the kubeconfig. Raises ClickException."""
    try:
        from csi_driver.kube.admin.kubeconfig import user_configuration
        from csi_driver.kube.admin.object_reader import ObjectReader
        from csi_driver.kube.connection import Api
    except ImportError as error:
        hint = "install certmount[authority], or run the command in the image"
        raise click.ClickException(f"the package {error.name} is missing; {hint}") from None

    async def run() -> _T:
        async with Api(await user_configuration(context)) as api:
            return await action(ObjectReader(api))

    with errors_for_users():
        return asyncio.run(run())


def table(header: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Yield an aligned table on a terminal, cut to its width; else rows of complete cells, separated by tabs."""
    cells = [header, *([printable(cell) or "-" for cell in row] for row in rows)]
    if not sys.stdout.isatty():
        yield from ("\t".join(row) for row in cells)
        return
    short = [[shortened(cell, _MAX_CELL) for cell in row] for row in cells]
    widths, columns = [max(map(len, column)) for column in zip(*short, strict=True)], shutil.get_terminal_size().columns
    for row in short:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))[:columns].rstrip()


def color(text: str, name: str) -> str:
    """Return colored text; ``click.echo`` removes colors unless the output is a terminal."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=name)
