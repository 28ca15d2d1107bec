"""``python -m tests.bench [SECTION ...]``: measures what needs no Kubernetes.

A missed budget is printed, and does not fail the run. The exit status is 1 only if a result is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.attacks import measure_attacks
from tests.bench.authority import measure_authority
from tests.bench.blocks import measure_blocks
from tests.bench.footprint import fill, measure_idle, measure_memory, measure_restart
from tests.bench.growth.issuing import measure_issuing
from tests.bench.growth.streams import measure_streams
from tests.bench.growth.structures import measure_structures
from tests.bench.publishing import measure_burst, measure_publish, measure_republish
from tests.bench.table import Figure, print_table
from tests.bench.world import MOUNTS, WrongResultError, driving, issuing, unmount_leftovers
from tests.support.machine import describe, load

_CALLS = {"publish": measure_publish, "burst": measure_burst, "republish": measure_republish}
SECTIONS = (*_CALLS, "memory", "idle", "restart", "attacks", "blocks", "authority", "growth")


async def run(directory: Path, sections: set[str]) -> list[Figure]:
    """Measure the sections. Sections that influence each other get new processes."""
    figures: list[Figure] = []
    async with issuing(directory) as issuer:
        if sections & _CALLS.keys():
            async with driving(directory / "calls", issuer) as world:
                for name, measure in _CALLS.items():
                    figures += await measure(world) if name in sections else []
        if sections & {"memory", "idle", "restart"}:
            async with driving(directory / "full", issuer) as world:
                if "memory" in sections:
                    figures += await measure_memory(world)
                else:
                    await fill(world)
                if "idle" in sections:
                    figures += await measure_idle(world)
                if "restart" in sections:
                    async with driving(directory / "empty", issuer) as empty:
                        figures += await measure_restart(world, empty)
    if "attacks" in sections:
        async with issuing(directory / "attacks", delay_ms=0) as issuer:
            figures += await measure_attacks(directory, issuer)
    if "blocks" in sections:
        figures += measure_blocks(directory)
    if "authority" in sections:
        figures += await measure_authority(directory)
    if "growth" in sections:
        figures += [*await measure_structures(), *await measure_issuing(directory), *await measure_streams(directory)]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; default: all")
    sections = set(parser.parse_args().sections) or set(SECTIONS)
    if unknown := sections - set(SECTIONS):
        parser.error(f"unknown section: {', '.join(sorted(unknown))}")
    print(f"Machine: {describe()}")
    if MOUNTS == "directory":
        print("Not root: directories in /dev/shm replace mounts, so figures that include mounts differ from a node's.")
    started = time.monotonic()
    parent = "/dev/shm" if MOUNTS == "directory" else None
    with tempfile.TemporaryDirectory(prefix="certmount-bench-", dir=parent) as name:
        directory = Path(name).resolve()
        try:
            figures = asyncio.run(run(directory, sections))
        except WrongResultError as error:
            sys.exit(f"wrong result: {error}")
        finally:
            unmount_leftovers(directory)
    print()
    print_table(figures)
    print(f"The run took {time.monotonic() - started:.0f} s; load after the run {load()}.")


if __name__ == "__main__":
    main()
