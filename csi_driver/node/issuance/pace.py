"""How fast a node asks for certificates: as fast as the authority answers, and hardly at all while it does not.

A thousand nodes that each retry each volume for itself would keep an authority that comes back from coming back. So while
there is no answer a node has one call under way, with growing pauses. From there it is as with TCP (RFC 5681): what is
answered makes room for one more with each round, what is refused for half as many, and for a pause.
Pure: the time is an argument (seconds of a clock that is never set).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.renewal import catch_up_delay_s, probe_delay_s

_UNDONE_BY = 8
"""Answers that undo one refusal: nodes that share a busy authority must not all come back after their first success."""
SIDE_BY_SIDE = 8
"""Renewals at once: enough to use an authority well after an outage, few enough to leave the node to its pods."""
SILENCE = frozenset(
    {
        Reason.AUTHORITY_UNAVAILABLE,
        Reason.TOKEN_REVIEW_UNAVAILABLE,
        Reason.ISSUER_UNAVAILABLE,
        Reason.ROOT_CERTIFICATE_MISSING,
        Reason.TOKEN_MISSING,  # of a call: the node's own
    }
)
"""Reasons that every other call to the same issuer would most likely meet as well."""
PACED = SILENCE | {Reason.AUTHORITY_OVERLOADED, Reason.TOO_MANY_REQUESTS}
"""Reasons that slow a node down."""


class Pace:
    """Of one issuer's calls. Those that nobody paces (a kubelet waits for them) are told to it all the same."""

    def __init__(self, rng: Callable[[], float], width: float = 1.0, most: int = SIDE_BY_SIDE) -> None:
        self._rng = rng
        self._width = width
        self._most = most
        self._under_way = 0
        # Calls in a row that failed, less what answers undid of them.
        self._failures = 0.0
        self._paused_at = -math.inf
        self._pause_jitter = 0.0
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

    def wait_s(self, now: float, left_s: float) -> float:
        """Seconds until a call may begin; infinite where one that is under way must end first.

        ``left_s`` of its certificate's life are left to the most urgent of those that wait.
        """
        if self._under_way >= math.floor(self._width):
            return math.inf
        return self.pause_s(now, left_s)

    def pause_s(self, now: float, left_s: float) -> float:
        """Seconds of a pause that are left; 0 where there is none."""
        if not self._failures:
            return 0.0
        pause = probe_delay_s(attempt=self._failures, left_s=left_s, jitter=self._pause_jitter)
        return max(self._paused_at + pause - now, 0.0)

    def heard(self, stamp: int, error: CertmountError | None, now: float) -> float | None:
        """A call that began with this stamp has ended. Where that ends a silence, gives how many seconds there was none."""
        if error is not None and error.reason in PACED:
            self._refused(stamp, error, now)
            return None
        if self._silent_since is None:
            self._width = min(self._width + 1 / self._width, self._most)
            self._failures = max(self._failures - 1 / _UNDONE_BY, 0.0)
            return None
        silence = now - self._silent_since
        self._silent_since, self.trouble = None, None
        self._width, self._failures = 1.0, 0.0
        return silence

    def _refused(self, stamp: int, error: CertmountError, now: float) -> None:
        # What kubelets ask for goes on in a pause; it must not put off for ever what waits for its end.
        if stamp != self.stamp or self.pause_s(now, 0.0) > 0:
            return
        self._width = max(self._width / 2, 1.0)
        if error.reason is Reason.TOO_MANY_REQUESTS:  # the pod's or the node's own limit, and no one else's trouble
            return
        if error.reason in SILENCE:
            self._silent_since = now if self._silent_since is None else self._silent_since
            self.trouble = error
            self._width = 1.0
        self.stamp += 1
        self._failures += 1
        self._paused_at, self._pause_jitter = now, self._rng()


def spread_s(silence_s: float, rng: Callable[[], float], left_s: float) -> float:
    """Seconds by which to put off what waited for the end of a silence; ``left_s`` of its certificate's life are left."""
    return catch_up_delay_s(silence_s=silence_s, left_s=left_s, jitter=rng())
