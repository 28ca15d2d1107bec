"""When to renew, and when to try again: formulas only. Times are unix seconds, randomness is a number from 0 to 1."""

from __future__ import annotations

from csi_driver.core.errors import FailureKind

RENEWAL_FRACTION = 2 / 3
"""Of a certificate's life, counted from when it was issued; leaves a third of it to outlast an outage."""
JITTER = 0.1
"""Share of the shorter side (before or after the planned moment) that chance may move a renewal by, either way."""
_MARGIN_S = 1.0
"""Least time from issuance to renewal and from there to the end, where the life has room for it (a third, else): a pod
can't make its node ask without a pause, nor plan a renewal for a moment at which any delay is an outage."""
_FIRST_RETRY_S = 1.0
_RETRY_CAP_S = 30.0
"""So that a volume heals within a minute of the authority's return."""
_PROBE_CAP_S = 600.0
_REFUSED_CAP_S = 300.0
"""Policies get fixed, but by people: asking more often helps no one."""


def plan_renewal(
    *,
    issued_at: float,
    not_after: float,
    renew_before_s: float | None,
    renew_after_s: float | None,
    jitter: float,
    late_s: float = 0.0,
) -> float:
    """The moment to renew: the issuer's hint if it is sooner, else the user's ``renew-before``, else two thirds of the life; jittered.

    What lies outside the life is passed over, and a margin is kept on both sides: so whatever user and issuer say, the
    moment lies between ``issued_at`` and ``not_after``, and renewals never follow one another without a pause.

    ``late_s`` says by how much this certificate came later than it was planned; infinite for a volume's first. Those of
    many nodes come together after an outage or a restart, and must not do so for ever after: where neither user nor issuer
    says when, chance brings the next one forward by as much as the last was late, and by half of the time at most.
    """
    life = max(not_after - issued_at, 0.0)
    margin = min(_MARGIN_S, life * (1 - RENEWAL_FRACTION))
    # A renew-before as long as the life (the issuer gave less than was asked) would renew without end.
    planned, asked = life * RENEWAL_FRACTION, False
    if renew_before_s is not None and 0 < renew_before_s < life:
        planned, asked = life - renew_before_s, True
    if renew_after_s is not None and 0 < renew_after_s < planned:
        planned, asked = renew_after_s, True
    planned = min(max(planned, margin), life - margin)
    half_width = JITTER * min(planned, life - planned)
    forward = 0.0 if asked else min(late_s, planned / 2)
    return issued_at + planned + half_width - (1 - jitter) * (2 * half_width + forward)


def retry_delay_s(*, attempt: int, kind: FailureKind, jitter: float) -> float:
    """Seconds until the next try after ``attempt`` failures in a row (1 or more): doubling from one second, jittered by a quarter."""
    cap = _RETRY_CAP_S if kind.retryable else _REFUSED_CAP_S
    delay = min(_FIRST_RETRY_S * 2.0 ** min(attempt - 1, 30), cap)
    return delay * (0.75 + 0.5 * jitter)


def probe_delay_s(*, attempt: float, left_s: float, jitter: float) -> float:
    """Seconds until a node asks an authority again that gave no certificate ``attempt`` times in a row.

    Doubling as :func:`retry_delay_s`, but up to a fortieth of what is left of the life that ends first, from half a minute
    to ten: nodes that can wait leave the first minutes after an outage to those that can't.
    """
    cap = min(max(left_s / 40, _RETRY_CAP_S), _PROBE_CAP_S)
    doubled: float = _FIRST_RETRY_S * 2.0 ** min(attempt - 1, 30)
    return min(doubled, cap) * (0.75 + 0.5 * jitter)


def catch_up_delay_s(*, silence_s: float, left_s: float, jitter: float) -> float:
    """Seconds by which a renewal that fell due while the authority was silent is put off when it answers again.

    So that not all nodes ask for all at once: over as long again as the silence was, but over no more than a quarter of
    what is left of the certificate's life; one that has ended is not put off.
    """
    return jitter * max(min(silence_s, left_s / 4), 0.0)
