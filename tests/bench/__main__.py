"""``python -m tests.bench [SECTION ...]``: the figures that need no Kubernetes.

A missed budget is printed as missed and is no failure; the exit status is 1 only where something did not work.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.authority import measure_authority
from tests.bench.blocks import measure_blocks
from tests.bench.footprint import fill, measure_idle, measure_memory, measure_restart
from tests.bench.machine import describe, load
from tests.bench.publishing import measure_burst, measure_publish, measure_republish
from tests.bench.table import Figure, print_table
from tests.bench.world import MOUNTS, WrongResult, driving, issuing, unmount_left

SECTIONS = ("publish", "burst", "republish", "memory", "idle", "restart", "blocks", "authority")


async def run(folder: Path, sections: set[str]) -> list[Figure]:
    """Measures the sections, each with fresh processes where an earlier one would leave its traces."""
    figures: list[Figure] = []
    async with issuing(folder) as issuer:
        if sections & {"publish", "burst", "republish"}:
            async with driving(folder / "calls", issuer) as world:
                if "publish" in sections:
                    figures += await measure_publish(world)
                if "burst" in sections:
                    figures += await measure_burst(world)
                if "republish" in sections:
                    figures += await measure_republish(world)
        if sections & {"memory", "idle", "restart"}:
            async with driving(folder / "full", issuer) as world:
                if "memory" in sections:
                    figures += await measure_memory(world)
                else:
                    await fill(world)
                if "idle" in sections:
                    figures += await measure_idle(world)
                if "restart" in sections:
                    async with driving(folder / "empty", issuer) as empty:
                        figures += await measure_restart(world, empty)
    if "blocks" in sections:
        figures += measure_blocks(folder)
    if "authority" in sections:
        figures += await measure_authority(folder)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}; all by default")
    sections = set(parser.parse_args().sections) or set(SECTIONS)
    if unknown := sections - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    print(f"Machine: {describe()}")
    if MOUNTS == "directory":
        print(
            "Not root: plain folders in /dev/shm stand in for mounts, so figures with mounts in them say less than on a node."
        )
    started = time.monotonic()
    parent = "/dev/shm" if MOUNTS == "directory" else None
    with tempfile.TemporaryDirectory(prefix="certmount-bench-", dir=parent) as name:
        folder = Path(name).resolve()
        try:
            figures = asyncio.run(run(folder, sections))
        except WrongResult as problem:
            sys.exit(f"wrong result: {problem}")
        finally:
            unmount_left(folder)
    print()
    print_table(figures)
    print(f"The run took {time.monotonic() - started:.0f} s; load after it {load()}.")


if __name__ == "__main__":
    main()
