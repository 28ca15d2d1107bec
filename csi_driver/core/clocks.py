"""Errors about clocks that differ: how much, between whom, and what to do."""

from __future__ import annotations

from csi_driver.core.errors import CertmountError, Reason

TOLERANCE_S = 20.0  # a smaller difference has no effect, and delays of a call can cause it


def describe_skew(one: str, other: str, seconds: float, *, at_least: bool = False) -> str:
    """Describe a difference of clocks for people. With ``at_least``, the difference is only a lower bound."""
    size = abs(seconds)
    # Steps that people recognise: 90 s, 2 min, 2 h, 30 days.
    unit, length = next(
        (unit, length)
        for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
        if size >= 1.95 * length or length == 1
    )
    bound = " or more" if at_least else ""
    return f"the clocks of {one} and {other} differ by about {round(size / length)} {unit}{bound}; synchronize them"


def clock_error(one: str, other: str, seconds: float, problem: str, *, at_least: bool = False) -> CertmountError:
    """Return ClockSkew for a ``problem`` that the difference causes, such as "the certificate expired at 14:03"."""
    return CertmountError(Reason.CLOCK_SKEW, f"{describe_skew(one, other, seconds, at_least=at_least)} ({problem})")
