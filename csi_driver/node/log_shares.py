"""Limits the log lines about failures of pods."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import structlog

from csi_driver.telemetry.log_shares import LogShares


class PodLogShares:
    """Implements :class:`csi_driver.rpc.server.CallerLimits`: the only caller is the kubelet, which acts for many pods."""

    def __init__(self) -> None:
        self._shares = LogShares()

    def may_log(self) -> bool:
        """Return whether to log a failure of the pod in the log context, and count it."""
        return self._shares.may_log(str(structlog.contextvars.get_contextvars().get("pod", "")).partition("/")[0])

    def receiving(self, _peer: str, /) -> AbstractContextManager[None]:
        return nullcontext()

    async def answer_failure(self, _peer: str, /) -> bool:
        return self.may_log()
