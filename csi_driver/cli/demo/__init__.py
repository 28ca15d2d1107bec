"""``certmount demo``: runs the real authority and node driver on this machine and simulates the rest of Kubernetes.

``steps`` shows the demo; ``programs`` runs the two programs; ``cluster`` simulates the API server's token issuer and the
kubelet; ``connections`` are the pods' TLS connections. No other package imports this one.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from importlib.util import find_spec
from pathlib import Path

import click

from csi_driver.cli.demo.output import DemoError, Output
from csi_driver.cli.demo.steps import run

_MAX_ROTATIONS = 1000  # about 50 minutes: the pods' tokens are valid for an hour, and the demo does not renew them


@click.command(name="demo")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Copy the last root.crt, site.crt and site.key to DIR.",
)
@click.option(
    "--rotations",
    type=click.IntRange(1, _MAX_ROTATIONS),
    default=2,
    show_default=True,
    help="Number of certificate renewals to show; each takes about three seconds.",
)
@click.pass_context
def command(context: click.Context, keep: Path | None, rotations: int) -> None:
    """Show the life of a pod's certificate, without Kubernetes and without root."""
    if os.environ.get("NO_COLOR"):  # no-color.org; click checks only for a terminal
        context.color = False
    if find_spec("yaml") is None:
        raise click.ClickException("the demo also runs the authority; run: pip install 'certmount[authority]'")
    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(f"{keep}: {error.strerror}", param_hint="--keep") from None
    output = Output()
    try:
        number = asyncio.run(_run_until_signal(run(output, keep, rotations)))
    except DemoError as error:
        output.failed(error)
        context.exit(1)
    if number:
        output.stopped()
        context.exit(128 + number)


async def _run_until_signal(demo: Coroutine[object, object, None]) -> int:
    """Run the demo. The first signal cancels it; later signals do not interrupt the cleanup. Return the first one, or 0."""
    running = asyncio.create_task(demo, name="demo")
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            running.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    await asyncio.wait([running])
    if running.cancelled():
        return received[0]
    running.result()
    return 0
