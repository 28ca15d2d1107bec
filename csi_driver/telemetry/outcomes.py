"""The value of the label ``reason`` in the metrics of calls."""

from __future__ import annotations

from csi_driver.core.errors import Reason


def outcome(reason: Reason | None, *, cancelled: bool = False) -> str:
    """Return the reason of a failure, ``Cancelled`` if the caller did not wait for the response, or ``Ok``."""
    return "Cancelled" if cancelled else reason.word if reason else "Ok"
