"""Runs the scripted authority as a program that also measures its calls: ``python -m tests.bench.issuer DIR --delay-ms 20``.

Writes DIR/root.crt, DIR/node-token and DIR/address, and prints ``ready``. For each line on standard input it prints a JSON list:
the seconds that each Issue call since the last line took in the authority, in the order of completion.
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
    """Records the duration of each Issue call in memory."""

    def __init__(self, directory: Path, script: Script) -> None:
        super().__init__(directory, script)
        self.seconds: list[float] = []

    async def Issue(self, request: authority_pb2.IssueRequest, context: Any) -> Response:  # noqa: N802  # gRPC's name
        started = time.perf_counter()
        try:
            return await super().Issue(request, context)
        finally:
            self.seconds.append(time.perf_counter() - started)


async def serve(directory: Path, delay_s: float) -> None:
    async with TimedAuthority(directory, Script(delay_s=delay_s)) as authority:
        (directory / "address").write_text(authority.address)
        print("ready", flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            seconds, authority.seconds = authority.seconds, []
            print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.directory, arguments.delay_ms / 1000))
