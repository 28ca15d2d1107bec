"""The failure that ends the demo."""

from __future__ import annotations


class DemoError(Exception):
    """A step of the demo failed. ``logs`` are the last log lines of the programs that can explain it."""

    def __init__(self, text: str, *logs: str) -> None:
        super().__init__(text)
        self.logs = logs
