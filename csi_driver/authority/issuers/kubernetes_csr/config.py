"""An issuer of this kind as the issuers' file declares it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.cluster.csr import LEAST_SECONDS, OWN_SIGNER, parse_signer
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import Source, parse_source
from csi_driver.core.durations import format_duration, parse_duration

LEAST_DURATION = timedelta(seconds=LEAST_SECONDS)
_KEYS = ("signer", "approve", "roots", "min_duration", "max_duration")


@dataclass(frozen=True, slots=True)
class KubernetesCSRConfiguration:
    """Which signer, who approves, and what pods are to trust."""

    signer: str
    approve: bool = False
    """True: the authority approves what it has made; False: someone else does."""
    roots: Source | None = None
    """Where the signer's roots are, in PEM, as the API tells none; None for our own signer, whose are the internal CA's."""
    min_duration: timedelta = LEAST_DURATION
    max_duration: timedelta | None = None
    """None: as long as the policy allows."""


def parse_kubernetes_csr(reader: DocumentReader, path: Path, value: object) -> KubernetesCSRConfiguration | None:
    """Reads what stands below ``kubernetes_csr``; see :data:`csi_driver.core.config.issuers.Parse`."""
    top = reader.mapping(path, value, allowed=_KEYS, required=("signer",))
    if not top:
        return None
    signer = reader.text((*path, "signer"), top.get("signer"), parse_signer)
    approve = top.get("approve", False)
    if not isinstance(approve, bool):
        reader.fault((*path, "approve"), "is neither true nor false")
    if top.get("roots") is None and signer not in (None, OWN_SIGNER):
        hint = "write roots: {file: PATH} or {secret: NAMESPACE/NAME, key: KEY}, with the signer's roots in PEM"
        reader.fault((*path, "roots"), "is missing, and the API does not tell what a signer's pods are to trust", hint)
    least = reader.text((*path, "min_duration"), top.get("min_duration"), _duration)
    most = reader.text((*path, "max_duration"), top.get("max_duration"), _duration)
    if least is not None and most is not None and most < least:
        reader.fault((*path, "max_duration"), f"is shorter than min_duration, {format_duration(least)}")
    for word in _KEYS[1:]:
        if word in top and top[word] is None and word != "approve":
            reader.fault((*path, word), "is empty", "leave it away, or say what it is")
    return KubernetesCSRConfiguration(
        signer=signer or "",
        approve=approve is True,
        roots=parse_source(reader, (*path, "roots"), top.get("roots")),
        min_duration=least or LEAST_DURATION,
        max_duration=most,
    )


def _duration(text: str) -> timedelta:
    duration = parse_duration(text)
    if duration < LEAST_DURATION:
        raise ValueError(
            f"is shorter than {format_duration(LEAST_DURATION)}, the least that the Kubernetes API lets ask for"
        )
    return duration
