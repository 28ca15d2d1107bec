"""Wait for a condition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_STEP_S = 0.01


async def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Wait until the condition is true. Fail after a timeout; ``what`` describes the condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        await asyncio.sleep(_STEP_S)
