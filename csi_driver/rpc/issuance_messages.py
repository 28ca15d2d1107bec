"""Conversions of the options of an issuance request to the wire format and back."""

from __future__ import annotations

from datetime import timedelta

from csi_driver._proto import authority_pb2
from csi_driver.core.attributes import IssuanceOptions
from csi_driver.core.errors import Fault
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, Usage

_TO_WIRE = {Usage.SERVER: authority_pb2.USAGE_SERVER, Usage.CLIENT: authority_pb2.USAGE_CLIENT}
_FROM_WIRE = {value: usage for usage, value in _TO_WIRE.items()}


def issue_request(csr: bytes, pod_token: Secret[str], options: IssuanceOptions) -> authority_pb2.IssueRequest:
    """Return the message for a CSR (DER)."""
    request = authority_pb2.IssueRequest(
        csr=csr,
        pod_token=pod_token.reveal(),
        usages=[_TO_WIRE[usage] for usage in options.usages],
        issuer=options.issuer,
        federations=options.federations,
    )
    if options.duration is not None:
        request.duration.FromTimedelta(options.duration)
    return request


def issuance_options(request: authority_pb2.IssueRequest) -> tuple[IssuanceOptions, list[Fault]]:
    """Return the options of a message, and a fault for each value that is invalid."""
    faults: list[Fault] = []
    duration = _duration(request)
    if duration is not None and duration < timedelta():
        faults.append(Fault("duration", "is negative or out of range"))
    if any(usage not in _FROM_WIRE for usage in request.usages):
        faults.append(Fault("usages", "has an unknown value"))
    options = IssuanceOptions(
        duration=duration,
        usages=tuple(dict.fromkeys(_FROM_WIRE[usage] for usage in request.usages if usage in _FROM_WIRE)),
        issuer=request.issuer or DEFAULT_ISSUER,
        federations=tuple(request.federations),
    )
    return options, faults


def _duration(request: authority_pb2.IssueRequest) -> timedelta | None:
    if not request.HasField("duration"):
        return None
    try:
        return request.duration.ToTimedelta()
    except (ValueError, OverflowError):
        return timedelta(-1)
