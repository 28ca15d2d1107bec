"""Limits the log lines about failures, so that the volumes of one namespace cannot fill the log of the node."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext

import structlog

from csi_driver.core.shares import FairShares

MAX_FAILURES_LOGGED = 600
"""Per minute. A single namespace gets half of them. Metrics count all failures, and pod events show them."""
_PERIOD_S = 60.0


class LogShares:
    """Implements :class:`csi_driver.rpc.server.CallerLimits`: the only caller is the kubelet, which acts for many pods."""

    def __init__(self) -> None:
        self._shares = FairShares("failures logged per minute", MAX_FAILURES_LOGGED)

    def may_log(self) -> bool:
        """Return whether to log a failure of the pod in the log context, and count it."""
        namespace = str(structlog.contextvars.get_contextvars().get("pod", "")).partition("/")[0]
        owners = (f"namespace {namespace}",)
        if may_log := self._shares.try_take(owners):
            asyncio.get_running_loop().call_later(_PERIOD_S, self._shares.give_back, owners)
        return may_log

    def receiving(self, _peer: str, /) -> AbstractContextManager[None]:
        return nullcontext()

    async def answer_failure(self, _peer: str, /) -> bool:
        return self.may_log()
