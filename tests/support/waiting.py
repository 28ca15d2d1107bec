"""Waits for what a test expects, with an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_STEP_S = 0.01


async def until(condition: Callable[[], object], what: str, patience_s: float = 20.0) -> None:
    """Returns as soon as the condition holds; fails the test with ``what`` was waited for."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:g} s for {what}"
        await asyncio.sleep(_STEP_S)
