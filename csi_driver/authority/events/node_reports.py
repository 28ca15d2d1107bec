"""Convert the certificate reports of node drivers to pod events."""

from __future__ import annotations

import re
from dataclasses import dataclass

from csi_driver.core.errors import REASONS, CertmountError, Fault, Reason

MAX_MESSAGE = 1024
"""Characters; the API server rejects a longer note."""
RECOVERED = "CertificateRecovered"
# Line breaks and other characters that control a terminal (Unicode categories Cc, Zl and Zp).
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class ReportedEvent:
    """A certificate condition that a node reported, as a pod event."""

    warning: bool
    reason: str
    message: str


def parse_report(condition: str | None, reason: str, message: str) -> ReportedEvent:
    """Return the event for a reported condition; raises CertmountError InvalidRequest with all faults.

    ``condition`` is an event reason, or None for an unknown condition.
    """
    faults: list[Fault] = []
    if condition is None:
        faults.append(Fault("condition", "is unknown"))
    if reason not in REASONS and (reason or condition != RECOVERED):
        faults.append(Fault("reason", "is unknown"))
    if len(message) > MAX_MESSAGE:
        faults.append(Fault("message", f"exceeds {MAX_MESSAGE} characters"))
    if condition is None or faults:
        raise CertmountError(Reason.INVALID_REQUEST, *faults)
    text = _CONTROL.sub(" ", f"{reason}: {message}" if reason else message)
    return ReportedEvent(condition != RECOVERED, condition, text[:MAX_MESSAGE])
