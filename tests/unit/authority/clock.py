"""A clock that tests advance."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class Clock:
    """Returns Unix seconds when called, and a datetime from :meth:`utc`."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def utc(self) -> datetime:
        return datetime.fromtimestamp(self.now, UTC).replace(microsecond=0)

    def forward(self, step: timedelta | float) -> None:
        self.now += step.total_seconds() if isinstance(step, timedelta) else step
