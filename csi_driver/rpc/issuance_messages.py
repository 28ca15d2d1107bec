"""Conversions of the options of an issuance request to the wire format and back."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeAlias

from csi_driver._proto import authority_pb2
from csi_driver.core.attributes import IssuanceOptions
from csi_driver.core.errors import Fault
from csi_driver.core.names import InvalidName
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, Usage
from csi_driver.core.subject import Subject

MAX_STREAM_REQUESTS = 256
"""Requests in progress on an IssueStream: as many as a node sends to external issuers, which can take a minute each."""
_TO_WIRE = {Usage.SERVER: authority_pb2.USAGE_SERVER, Usage.CLIENT: authority_pb2.USAGE_CLIENT}
_FROM_WIRE = {value: usage for usage, value in _TO_WIRE.items()}
_Request: TypeAlias = authority_pb2.IssueRequest | authority_pb2.IssueForSecretRequest


def issue_request(csr: bytes, pod_token: Secret[str], options: IssuanceOptions) -> authority_pb2.IssueRequest:
    """Return the message for a CSR (DER)."""
    request = authority_pb2.IssueRequest(
        csr=csr,
        pod_token=pod_token.reveal(),
        usages=[_TO_WIRE[usage] for usage in options.usages],
        issuer=options.issuer,
        federations=options.federations,
        without_spiffe_id=not options.spiffe,
        subject=str(options.subject),
    )
    if options.duration is not None:
        request.duration.FromTimedelta(options.duration)
    return request


def issuance_options(request: authority_pb2.IssueRequest) -> tuple[IssuanceOptions, list[Fault]]:
    """Return the options of a message, and a fault for each value that is invalid."""
    duration, usages, faults = duration_and_usages(request)
    subject = Subject()
    try:
        subject = Subject.parse(request.subject) if request.subject else subject
    except InvalidName as problem:
        faults.append(Fault("subject", str(problem)))
    options = IssuanceOptions(
        duration=duration,
        usages=usages,
        issuer=request.issuer or DEFAULT_ISSUER,
        federations=tuple(request.federations),
        spiffe=not request.without_spiffe_id,
        subject=subject,
    )
    return options, faults


def duration_and_usages(request: _Request) -> tuple[timedelta | None, tuple[Usage, ...], list[Fault]]:
    """Return these options of a message, and a fault for each value that is invalid."""
    faults: list[Fault] = []
    duration = _duration(request)
    if duration is not None and duration < timedelta():
        faults.append(Fault("duration", "is negative or out of range"))
    if any(usage not in _FROM_WIRE for usage in request.usages):
        faults.append(Fault("usages", "has an unknown value"))
    usages = tuple(dict.fromkeys(_FROM_WIRE[usage] for usage in request.usages if usage in _FROM_WIRE))
    return duration, usages, faults


def _duration(request: _Request) -> timedelta | None:
    if not request.HasField("duration"):
        return None
    try:
        return request.duration.ToTimedelta()
    except (ValueError, OverflowError):
        return timedelta(-1)
