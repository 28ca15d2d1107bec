"""The scripted authority as a program of its own that also tells how long each of its calls took.

    python -m tests.bench.issuer DIR --delay-ms 20

writes DIR/root.crt, DIR/node-token and DIR/address, says ``ready``, then answers every line on standard input with a JSON
list: the seconds that each Issue since the last line spent in the authority, in the order in which they ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from csi_driver._proto import authority_pb2
from tests.support.scripted_authority import Response, Script, ScriptedAuthority


class TimedAuthority(ScriptedAuthority):
    """Keeps the time of every Issue; nothing is written while calls are under way."""

    def __init__(self, folder: Path, script: Script) -> None:
        super().__init__(folder, script)
        self.seconds: list[float] = []

    async def Issue(self, request: authority_pb2.IssueRequest, context: Any) -> Response:  # noqa: N802  # gRPC's name
        started = time.perf_counter()
        try:
            return await super().Issue(request, context)
        finally:
            self.seconds.append(time.perf_counter() - started)


async def serve(folder: Path, delay_s: float) -> None:
    """Serves until standard input ends."""
    async with TimedAuthority(folder, Script(delay_s=delay_s)) as authority:
        (folder / "address").write_text(authority.address)
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            seconds, authority.seconds = authority.seconds, []
            print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.folder, arguments.delay_ms / 1000))
