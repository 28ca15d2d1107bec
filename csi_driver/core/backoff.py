"""Exponential backoff with jitter."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_EXPONENT = 32  # prevents an overflow after many failures; every cap is reached earlier


@dataclass(frozen=True, slots=True)
class Backoff:
    """The delay before each retry: ``first_s``, multiplied by ``factor`` after each further failure, at most ``cap_s``.

    ``jitter`` is the largest relative deviation: with 0.5 a delay lies between 50% and 150% of the computed value.
    """

    first_s: float
    cap_s: float
    factor: float = 2.0
    jitter: float = 0.0

    def delay_s(self, failures: float, rng: float = 0.5) -> float:
        """Return the seconds to wait after this many consecutive failures (at least 1). ``rng`` is in [0, 1)."""
        delay_s: float = min(self.first_s * self.factor ** min(failures - 1, _MAX_EXPONENT), self.cap_s)
        return delay_s * (1 + self.jitter * (2 * rng - 1))
