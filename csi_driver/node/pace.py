"""How fast a node asks for certificates: as fast as the authority answers, and hardly at all while it does not.

A thousand nodes that each retry each volume for itself would keep an authority that comes back from coming back. So while
there is no answer a node has one call under way, with growing pauses, and after an answer one more with each further one.
Pure: the time is an argument (seconds of a clock that is never set).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from csi_driver.core.errors import CertmountError, Kind, Reason
from csi_driver.core.renewal import retry_delay_s

SIDE_BY_SIDE = 8
"""Renewals at once: enough to use an authority well after an outage, few enough to leave the node to its pods."""
SILENCE = frozenset(
    {
        Reason.AUTHORITY_UNAVAILABLE,
        Reason.PROOF_UNAVAILABLE,
        Reason.ISSUER_UNAVAILABLE,
        Reason.TRUST_MISSING,
        Reason.TOKEN_MISSING,  # of a call: the node's own
    }
)
"""Reasons that every other call to the same issuer would most likely meet as well."""
PACED = SILENCE | {Reason.OVERLOADED, Reason.TOO_MANY_REQUESTS}
"""Reasons that slow a node down."""


class Pace:
    """Of one issuer's calls. Those that nobody paces (a kubelet waits for them) are told to it all the same."""

    def __init__(self, chance: Callable[[], float], width: int = 1) -> None:
        self._chance = chance
        self._width = width
        self._under_way = 0
        self._failures = 0
        self._not_before = -math.inf
        self._silent_since: float | None = None
        self.stamp = 0
        """Counts the pauses. A failure of a call that began before the last one tells nothing new."""
        self.trouble: CertmountError | None = None
        """Why there is no answer; None while there is one."""

    def begin(self) -> None:
        """A call begins."""
        self._under_way += 1

    def end(self) -> None:
        """A call that began has ended, whatever became of it."""
        self._under_way -= 1

    def wait_s(self, now: float) -> float:
        """Seconds until a call may begin; infinite where one that is under way must end first."""
        if self._under_way >= self._width:
            return math.inf
        return self.pause_s(now)

    def pause_s(self, now: float) -> float:
        """Seconds of a pause that are left; 0 where there is none."""
        return max(self._not_before - now, 0.0)

    def answered(self, now: float) -> float | None:
        """A call was answered. Where that ends a silence, gives how many seconds there was none."""
        if self._silent_since is None:
            self._width = min(self._width + 1, SIDE_BY_SIDE)
            self._failures = max(self._failures - 1, 0)
            return None
        silence = now - self._silent_since
        self._silent_since, self.trouble = None, None
        self._width, self._failures, self._not_before = 1, 0, -math.inf
        return silence

    def refused(self, stamp: int, error: CertmountError, now: float) -> None:
        """A call that began with this stamp failed with one of the reasons in ``PACED``."""
        if stamp != self.stamp or now < self._not_before:
            return
        if error.reason in SILENCE:
            self._silent_since = now if self._silent_since is None else self._silent_since
            self.trouble = error
            self._width = 1
        self._width = max(self._width // 2, 1)
        if error.reason is Reason.TOO_MANY_REQUESTS:  # the pod's or the node's own limit, and no one else's trouble
            return
        self.stamp += 1
        self._failures += 1
        self._not_before = now + retry_delay_s(attempt=self._failures, kind=Kind.EXHAUSTED, chance=self._chance())
