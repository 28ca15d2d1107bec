"""Limits the log lines about failures, so that what one namespace causes cannot fill the log."""

from __future__ import annotations

import asyncio

from csi_driver.core.shares import FairShares

MAX_FAILURES_LOGGED = 600
"""Per minute. A single namespace gets half of them. Metrics count all failures, and events show them."""
_PERIOD_S = 60.0


class LogShares:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._shares = FairShares("failures logged per minute", MAX_FAILURES_LOGGED)

    def may_log(self, namespace: str) -> bool:
        """Return whether to log a failure, and count it."""
        owners = (f"namespace {namespace}",)
        if may_log := self._shares.try_take(owners):
            asyncio.get_running_loop().call_later(_PERIOD_S, self._shares.give_back, owners)
        return may_log
