"""The configuration of a kubernetes_csr issuer in the issuers file."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER, MIN_EXPIRATION_S, parse_signer
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import CredentialSource, parse_source
from csi_driver.core.durations import format_duration, parse_duration

MIN_DURATION = timedelta(seconds=MIN_EXPIRATION_S)
_KEYS = ("signer", "approve", "roots", "min_duration", "max_duration")


@dataclass(frozen=True, slots=True)
class KubernetesCSRConfiguration:
    """The signer, who approves its requests, and its roots."""

    signer: str
    approve: bool = False
    """True if the authority approves its own requests."""
    roots: CredentialSource | None = None
    """The signer's roots in PEM, which the API does not publish; None for certmount's own signer, which is the internal CA."""
    min_duration: timedelta = MIN_DURATION
    max_duration: timedelta | None = None
    """None if only the policy limits the lifetime."""


def parse_kubernetes_csr(reader: DocumentReader, path: Path, value: object) -> KubernetesCSRConfiguration | None:
    """Parse the value of ``kubernetes_csr``; see :data:`csi_driver.core.config.issuers.ParseConfiguration`."""
    top = reader.mapping(path, value, allowed=_KEYS, required=("signer",))
    if not top:
        return None
    signer = reader.text((*path, "signer"), top.get("signer"), parse_signer)
    approve = top.get("approve", False)
    if not isinstance(approve, bool):
        reader.fault((*path, "approve"), "is neither true nor false")
    if top.get("roots") is None and signer not in (None, CERTMOUNT_SIGNER):
        hint = "set roots: {file: PATH} or {secret: NAMESPACE/NAME, key: KEY}, with the signer's roots in PEM"
        reader.fault((*path, "roots"), "is missing; the Kubernetes API does not publish a signer's roots", hint)
    least = reader.text((*path, "min_duration"), top.get("min_duration"), _parse_duration)
    most = reader.text((*path, "max_duration"), top.get("max_duration"), _parse_duration)
    if least is not None and most is not None and most < least:
        reader.fault((*path, "max_duration"), f"is shorter than min_duration, {format_duration(least)}")
    for name in ("roots", "min_duration", "max_duration"):
        if name in top and top[name] is None:
            reader.fault((*path, name), "is empty", "set a value or omit it")
    return KubernetesCSRConfiguration(
        signer=signer or "",
        approve=approve is True,
        roots=parse_source(reader, (*path, "roots"), top.get("roots")),
        min_duration=least or MIN_DURATION,
        max_duration=most,
    )


def _parse_duration(text: str) -> timedelta:
    duration = parse_duration(text)
    if duration < MIN_DURATION:
        raise ValueError(f"is shorter than {format_duration(MIN_DURATION)}, the minimum of the Kubernetes API")
    return duration
