"""Runs the demo from setup to cleanup."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from csi_driver.cli.demo import steps
from csi_driver.cli.demo.connections import ConnectionLoop, serve
from csi_driver.cli.demo.errors import DemoError
from csi_driver.cli.demo.output import Output
from csi_driver.cli.demo.programs import MEMORY, private_directory
from csi_driver.cli.demo.setup import DemoSetup, prepare


async def run(output: Output, keep: Path | None, rotations: int) -> None:
    """Run all steps; copy the last files to ``keep``. Raises DemoError.

    On return and on any error, all processes have ended and the demo's directory is deleted.
    """
    title = "certmount demo: a TLS certificate for a pod, rotated in place, without Kubernetes and without root"
    output.text(title, bold=True)
    with private_directory() as name:
        directory = Path(name)
        where = "in memory" if directory.parent == MEMORY else f"on disk, because {MEMORY} is not writable"
        output.text(f"\nAll files are in {directory} ({where}). The demo deletes them at the end.")
        output.text("Directories and symbolic links replace mounts, so the demo does not need root.")
        async with _running(directory) as setup:
            await _run_steps(output, setup, keep, rotations)
        output.success("the authority and the node driver have stopped")
    output.success(f"{directory} is deleted")
    _print_next_steps(output, keep)


async def _run_steps(output: Output, setup: DemoSetup, keep: Path | None, rotations: int) -> None:
    await steps.wait_until_ready(output, setup)
    shop = await steps.publish_shop(output, setup.kubelet)
    steps.show_certificate(output, shop)
    cart = await steps.publish_cart(output, setup.kubelet)
    async with serve(shop.target) as port:
        connection = await steps.connect_once(output, cart, port)
        loop = ConnectionLoop(cart.target, port, steps.SHOP_NAME)
        await steps.rotate(output, loop, connection, rotations)
    await steps.request_foreign_name(output, setup.kubelet)
    if keep is not None:
        steps.keep_files(shop, keep)
    await steps.unpublish(output, setup.kubelet, shop, cart)


@asynccontextmanager
async def _running(directory: Path) -> AsyncIterator[DemoSetup]:
    """Start both programs, and stop them at the end. Adds their last log lines to a failure."""
    setup = prepare(directory)
    programs = (setup.node, setup.authority)
    try:
        async with asyncio.TaskGroup() as tasks, aclosing(setup.kubelet):
            running = [tasks.create_task(program.run(), name=program.name) for program in programs]
            yield setup
            for program in running:
                program.cancel()
    except BaseExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, DemoError) and not cause.logs:
            raise DemoError(str(cause), setup.authority.log_tail(), setup.node.log_tail()) from None
        raise cause from None


def _print_next_steps(output: Output, keep: Path | None) -> None:
    if keep is None:
        output.text(f"\nTo inspect the files yourself, run: {_program()} demo --keep DIR")
        return
    output.text(f"\nThe last root.crt, site.crt and site.key are in {keep}. The certificate is valid for an hour. Try:")
    root, chain, key = (shlex.quote(str(keep / name)) for name in ("root.crt", "site.crt", "site.key"))
    output.code(
        [
            f"openssl verify -CAfile {root} -untrusted {chain} {chain}",
            f"openssl x509 -in {chain} -noout -issuer -dates -ext subjectAltName",
            f"openssl pkey -in {key} -noout -text_pub",
        ]
    )


def _program() -> str:
    """Return the command that runs certmount: its name if PATH contains it, else the path of this run."""
    path = Path(sys.argv[0])
    return shlex.quote(str(path)) if path.name == "certmount" and not shutil.which("certmount") else "certmount"
