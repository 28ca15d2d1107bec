"""Formulas for renewal times and retry delays. Times are in unix seconds; ``jitter`` is in [0, 1)."""

from __future__ import annotations

from datetime import timedelta

from csi_driver.core.backoff import Backoff
from csi_driver.core.durations import Percentage
from csi_driver.core.errors import FailureKind, Retry

RENEWAL_FRACTION = 2 / 3
"""The default renewal time, as a fraction of the lifetime. The last third remains to outlast an outage."""
JITTER = 0.1  # the largest shift of a renewal time, as a fraction of the shorter time to issuance or expiry
_MARGIN_S = 1.0
"""The shortest time from issuance to renewal and from renewal to expiry; a third of a lifetime below 3 s.

It prevents a renewal loop, and renewals that are so late that any delay is an outage.
"""
_RETRY_JITTER = 0.25
_RETRY = Backoff(1.0, 30.0, jitter=_RETRY_JITTER)
"""The cap lets a volume recover within a minute after the authority does."""
_SLOW_RETRY = Backoff(1.0, 300.0, jitter=_RETRY_JITTER)  # a person must act first, so more frequent retries do not help
_LONGEST_PROBE_DELAY_S = 600.0


def overdue_time(renew_at: float, not_after: float) -> float:
    """Return when a renewal is late: in the middle between the renewal time and the expiry."""
    return (renew_at + not_after) / 2


def plan_renewal(
    *,
    issued_at: float,
    not_after: float,
    renew_before: timedelta | Percentage | None,
    renew_after_s: float | None,
    jitter: float,
    late_s: float = 0.0,
) -> float:
    """Return the time when a certificate should be renewed.

    The earlier of ``renew_after_s`` (from the issuer, counted from issuance) and ``renew_before`` (from the user, counted
    from expiry) applies, with jitter. Values outside the lifetime are ignored. The default is 2/3 of the lifetime.

    ``late_s`` is the delay of this certificate relative to its planned time, infinity for the first one of a volume. After
    an outage or a restart, many nodes renew at the same time. To spread their later renewals, the default renewal time is
    moved forward by a random part of ``late_s``, by at most half of the time until renewal.
    """
    lifetime = max(not_after - issued_at, 0.0)
    margin = min(_MARGIN_S, lifetime * (1 - RENEWAL_FRACTION))
    planned, requested = lifetime * RENEWAL_FRACTION, False
    # The issuer can grant a shorter lifetime than requested. A renew-before of the whole lifetime would cause a loop.
    before_s = _seconds_before(renew_before, lifetime)
    if 0 < before_s < lifetime:
        planned, requested = lifetime - before_s, True
    if renew_after_s is not None and 0 < renew_after_s < planned:
        planned, requested = renew_after_s, True
    planned = min(max(planned, margin), lifetime - margin)
    half_width = JITTER * min(planned, lifetime - planned)
    forward = 0.0 if requested else min(late_s, planned / 2)
    return issued_at + planned + half_width - (1 - jitter) * (2 * half_width + forward)


def _seconds_before(renew_before: timedelta | Percentage | None, lifetime_s: float) -> float:
    """Return how many seconds before the expiry the user wants the renewal; 0 for the default."""
    if isinstance(renew_before, Percentage):
        return lifetime_s * renew_before.value / 100
    return renew_before.total_seconds() if renew_before else 0.0


def retry_delay_s(*, attempt: int, kind: FailureKind, jitter: float) -> float:
    """Return the seconds until the next retry after ``attempt`` consecutive failures (at least 1)."""
    backoff = _RETRY if kind.retry is Retry.BACKOFF else _SLOW_RETRY
    return backoff.delay_s(attempt, jitter)


def probe_delay_s(*, attempt: float, left_s: float, jitter: float) -> float:
    """Return the seconds until a node sends the next probe to an issuer after ``attempt`` consecutive failures.

    The cap is 1/40 of ``left_s``, the time until the first waiting certificate expires, and between 30 s and 10 min.
    Nodes whose certificates remain valid longer leave the first minutes after an outage to the others.
    """
    cap_s = min(max(left_s / 40, _RETRY.cap_s), _LONGEST_PROBE_DELAY_S)
    return Backoff(_RETRY.first_s, cap_s, jitter=_RETRY_JITTER).delay_s(attempt, jitter)


def catch_up_delay_s(*, outage_s: float, left_s: float, jitter: float) -> float:
    """Return the seconds by which a renewal that became due during an outage is postponed when the outage ends.

    This spreads the renewals of all nodes over the length of the outage, but over at most a quarter of ``left_s``, the time
    until the certificate expires. Renewals of expired certificates are not postponed.
    """
    return jitter * max(min(outage_s, left_s / 4), 0.0)
