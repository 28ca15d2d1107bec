"""Convert the certificate reports of node drivers to pod events."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from csi_driver._proto import authority_pb2
from csi_driver.core.errors import REASONS, CertmountError, Fault, Reason

MAX_MESSAGE = 1024
"""Characters; the API server rejects a longer note."""
RECOVERED = "CertificateRecovered"
CONDITIONS = MappingProxyType(
    {
        authority_pb2.CONDITION_RENEWAL_FAILING: "RenewalFailing",
        authority_pb2.CONDITION_OVERDUE: "RenewalOverdue",
        authority_pb2.CONDITION_EXPIRED: "CertificateExpired",
        authority_pb2.CONDITION_RECOVERED: RECOVERED,
        authority_pb2.CONDITION_RENEWAL_STOPPED: "RenewalStopped",
    }
)
"""The event reason for each certificate condition."""
# Line breaks and other characters that control a terminal (Unicode categories Cc, Zl and Zp).
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class ReportedEvent:
    """A certificate condition that a node reported, as a pod event."""

    warning: bool
    reason: str
    message: str


def parse_report(condition: int, reason: str, message: str) -> ReportedEvent:
    """Return the event for the fields of a ReportRequest; raises CertmountError InvalidRequest with all faults."""
    faults: list[Fault] = []
    event_reason = CONDITIONS.get(condition, "")  # type: ignore[call-overload]  # on the wire the enum is an integer
    if not event_reason:
        faults.append(Fault("condition", "is unknown"))
    if reason not in REASONS and (reason or event_reason != RECOVERED):
        faults.append(Fault("reason", "is unknown"))
    if len(message) > MAX_MESSAGE:
        faults.append(Fault("message", f"exceeds {MAX_MESSAGE} characters"))
    if faults:
        raise CertmountError(Reason.INVALID_REQUEST, *faults)
    text = _CONTROL.sub(" ", f"{reason}: {message}" if reason else message)
    return ReportedEvent(event_reason != RECOVERED, event_reason, text[:MAX_MESSAGE])
