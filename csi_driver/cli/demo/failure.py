"""Why the demo could not go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Log:
    """The last lines that a program logged."""

    program: str
    lines: Sequence[str]


class DemoFailed(Exception):
    """Something did not go as it must; ``logs`` are those of the programs that may know why."""

    def __init__(self, text: str, *logs: Log) -> None:
        super().__init__(text)
        self.logs = logs


def first_cause(error: BaseException) -> BaseException:
    """The first single exception of a group, or the exception itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
