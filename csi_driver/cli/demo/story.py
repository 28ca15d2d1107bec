"""The demo from its first line to its last: sets the stage, plays the acts, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from csi_driver.cli.demo import acts
from csi_driver.cli.demo.connections import ConnectionLoop, serving
from csi_driver.cli.demo.failure import DemoFailed, first_cause
from csi_driver.cli.demo.page import Page
from csi_driver.cli.demo.programs import MEMORY, private_folder
from csi_driver.cli.demo.stage import Stage, set_stage


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options of ``certmount demo``: a folder that exists, and a number from 1."""

    keep: Path | None
    rotations: int


async def tell(page: Page, wishes: Wishes) -> None:
    """The whole story. Raises DemoFailed; whatever happens, all processes have ended after it and the folder is gone."""
    page.title("certmount demo: a TLS certificate for a pod, rotated in place, without Kubernetes and without root")
    with private_folder() as name:
        folder = Path(name)
        where = "in memory" if folder.parent == MEMORY else f"on disk, as {MEMORY} cannot be written to"
        page.plain(f"\nEverything lies in {folder} ({where}) and is removed at the end.")
        page.plain("Folders and links stand in for mounts here, so that no root is needed.")
        async with _on_stage(folder) as stage:
            await _play(page, stage, wishes)
        page.good("the authority and the node driver have ended")
    page.good(f"{folder} is removed")
    _take_leave(page, wishes.keep)


async def _play(page: Page, stage: Stage, wishes: Wishes) -> None:
    await acts.introduce(page, stage)
    shop = await acts.publish_shop(page, stage.kubelet)
    acts.inspect(page, shop)
    cart = await acts.publish_cart(page, stage.kubelet)
    async with serving(shop.target) as port:
        met = await acts.shake_hands(page, cart, port)
        loop = ConnectionLoop(cart.target, port, acts.NAME)
        await acts.rotate(page, loop, met, wishes.rotations)
    await acts.ask_too_much(page, stage.kubelet)
    if wishes.keep is not None:
        acts.keep(shop, wishes.keep)
    await acts.end(page, stage.kubelet, shop, cart)


@asynccontextmanager
async def _on_stage(folder: Path) -> AsyncIterator[Stage]:
    """Starts both programs and ends them. A failure brings their last log lines with it."""
    stage = set_stage(folder)
    try:
        async with asyncio.TaskGroup() as tasks, aclosing(stage.kubelet):
            running = [tasks.create_task(program.run(), name=program.name) for program in (stage.node, stage.authority)]
            yield stage
            for program in running:
                program.cancel()
    except BaseExceptionGroup as group:
        cause = first_cause(group)
        if isinstance(cause, DemoFailed) and not cause.logs:
            raise DemoFailed(str(cause), stage.authority.last_log(), stage.node.last_log()) from None
        raise cause from None


def _take_leave(page: Page, keep: Path | None) -> None:
    if keep is None:
        page.plain(f"\nTo look at the files yourself: {_program()} demo --keep DIR")
        return
    page.plain(f"\nThe last root.crt, site.crt and site.key are in {keep}, the certificate valid for an hour. Try")
    root, chain, key = (shlex.quote(str(keep / name)) for name in ("root.crt", "site.crt", "site.key"))
    page.code(
        [
            f"openssl verify -CAfile {root} -untrusted {chain} {chain}",
            f"openssl x509 -in {chain} -noout -issuer -dates -ext subjectAltName",
            f"openssl pkey -in {key} -noout -text_pub",
        ]
    )


def _program() -> str:
    """How to call certmount again: by its name, or as it was called where PATH does not lead to it."""
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "certmount" and not shutil.which("certmount") else "certmount"
