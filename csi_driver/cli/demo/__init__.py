"""``certmount demo``: the real authority and node driver on this machine, and a stand-in for all that Kubernetes does.

``story`` tells it; ``programs`` starts and ends the two; ``kubelet`` and ``tokens`` play the cluster; ``connections`` are
the pods' own; ``certificate`` and ``page`` put it into words. Nothing here is used by anything else.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from importlib.util import find_spec
from pathlib import Path

import click

from csi_driver.cli.demo.failure import DemoFailed
from csi_driver.cli.demo.page import Page
from csi_driver.cli.demo.story import Wishes, tell

_MOST_ROTATIONS = 1000
"""About 50 minutes: the pods' tokens, which nobody renews here, last for an hour."""


@click.command(name="demo")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Leave the last root.crt, site.crt and site.key in DIR.",
)
@click.option(
    "--rotations",
    type=click.IntRange(1, _MOST_ROTATIONS),
    default=2,
    show_default=True,
    help="How often the certificate is to change under live connections; each takes about three seconds.",
)
@click.pass_context
def command(context: click.Context, keep: Path | None, rotations: int) -> None:
    """Show a pod's certificate from first mount to last, without Kubernetes and without root."""
    if os.environ.get("NO_COLOR"):  # no-color.org; click looks at the terminal only
        context.color = False
    if find_spec("yaml") is None:
        raise click.ClickException(
            "the demo runs the authority too; install it with: pip install 'certmount[authority]'"
        )
    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(f"{keep}: {error.strerror}", param_hint="--keep") from None
    page = Page()
    try:
        asyncio.run(_until_signalled(tell(page, Wishes(keep, rotations))))
    except DemoFailed as failure:
        page.failed(failure)
        context.exit(1)
    except _Stopped as stopped:
        page.stopped()
        context.exit(128 + stopped.number)


class _Stopped(Exception):
    """A signal asked for the end, and all is tidied up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


async def _until_signalled(story: Coroutine[object, object, None]) -> None:
    """Runs the story; the first signal ends it in order, further ones don't disturb that."""
    telling = asyncio.create_task(story, name="story")
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            telling.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    await asyncio.wait([telling])
    if telling.cancelled():
        raise _Stopped(received[0])
    telling.result()
