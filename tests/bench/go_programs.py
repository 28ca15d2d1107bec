"""Builds the Go programs of the benchmarks in the cache."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

from tests.bench.world import WrongResultError

CACHE = Path(os.environ.get("CERTMOUNT_CACHE") or Path.home() / ".cache" / "certmount")


async def build_go_program(name: str) -> Path | None:
    """Build the program in ``tests/bench/<name>``; return None without Go."""
    source = Path(__file__).parent / name
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(source.iterdir()))).hexdigest()[:12]
    program = CACHE / f"{name}-{digest}" / name
    if not program.exists():
        go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
        if go is None:
            return None
        command, environment = (go, "build", "-o", str(program), "."), {**os.environ, "CGO_ENABLED": "0"}
        build = await asyncio.create_subprocess_exec(*command, cwd=source, env=environment)
        if await build.wait():
            raise WrongResultError(f"{name} cannot be built")
    return program
