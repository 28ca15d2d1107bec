"""What a node tells of a pod's certificate, in the words of an Event."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from csi_driver._proto import authority_pb2
from csi_driver.core.errors import REASONS, CertmountError, Fault, Reason

MAX_MESSAGE = 1024
"""Characters; the API server refuses an event with more."""
RECOVERED = "CertificateRecovered"
CONDITIONS = MappingProxyType(
    {
        authority_pb2.CONDITION_RENEWAL_FAILING: "RenewalFailing",
        authority_pb2.CONDITION_OVERDUE: "RenewalOverdue",
        authority_pb2.CONDITION_EXPIRED: "CertificateExpired",
        authority_pb2.CONDITION_RECOVERED: RECOVERED,
        authority_pb2.CONDITION_RENEWAL_DROPPED: "RenewalDropped",
    }
)
"""The Event's reason for each condition."""
# Line breaks and whatever else a terminal might obey (Unicode categories Cc, and the line separators of Zl and Zp).
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class NodeReport:
    """An Event of type Warning, or of type Normal."""

    warning: bool
    reason: str
    message: str


def parse_report(condition: int, reason: str, message: str) -> NodeReport:
    """Takes what stands on the wire.

    Raises:
        CertmountError: InvalidRequest, with all that is not as our node driver says it.
    """
    faults: list[Fault] = []
    word = CONDITIONS.get(condition, "")  # type: ignore[call-overload]  # the stub's enum, which is a number on the wire
    if not word:
        faults.append(Fault("condition", "is not known to this authority"))
    if reason not in REASONS and (reason or word != RECOVERED):
        faults.append(Fault("reason", "is none of certmount's reasons"))
    if len(message) > MAX_MESSAGE:
        faults.append(Fault("message", f"is longer than {MAX_MESSAGE} characters"))
    if faults:
        raise CertmountError(Reason.INVALID_REQUEST, *faults)
    text = _CONTROL.sub(" ", f"{reason}: {message}" if reason else message)
    return NodeReport(word != RECOVERED, word, text[:MAX_MESSAGE])
