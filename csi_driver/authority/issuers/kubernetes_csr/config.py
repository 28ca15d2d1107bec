"""The configuration of a kubernetes_csr issuer in the issuers file."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.config_section import ConfigSection
from csi_driver.authority.issuers.dependencies import IssuerDependencies, IssuerKind, not_possible
from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER, MIN_EXPIRATION_S, parse_signer
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import CredentialSource
from csi_driver.core.durations import format_duration, parse_duration

MIN_DURATION = timedelta(seconds=MIN_EXPIRATION_S)
_KEYS = ("signer", "approve", "roots", "min_duration", "max_duration")


@dataclass(frozen=True, slots=True)
class KubernetesCSRConfiguration:
    """The signer, who approves its requests, and its roots."""

    signer: str
    approve: bool = False  # True if the authority approves its own requests
    roots: CredentialSource | None = None  # PEM; None for certmount's own signer, which is the internal CA
    min_duration: timedelta = MIN_DURATION
    max_duration: timedelta | None = None  # None if only the policy limits the lifetime


def parse_kubernetes_csr(reader: DocumentReader, path: Path, value: object) -> KubernetesCSRConfiguration | None:
    section = ConfigSection(reader, path, value, _KEYS, required=("signer",))
    if not section.values:
        return None
    signer = section.text("signer", parse_signer)
    if section.values.get("roots") is None and signer not in (None, CERTMOUNT_SIGNER):
        hint = "set roots: {file: PATH} or {secret: NAMESPACE/NAME, key: KEY}, with the signer's roots in PEM"
        section.fault("roots", "is missing; the Kubernetes API does not publish a signer's roots", hint)
    minimum, maximum = section.text("min_duration", _parse_duration), section.text("max_duration", _parse_duration)
    if minimum is not None and maximum is not None and maximum < minimum:
        section.fault("max_duration", f"is shorter than min_duration, {format_duration(minimum)}")
    return KubernetesCSRConfiguration(
        signer=signer or "",
        approve=section.boolean("approve"),
        roots=section.credential("roots"),
        min_duration=minimum or MIN_DURATION,
        max_duration=maximum,
    )


def _parse_duration(text: str) -> timedelta:
    duration = parse_duration(text)
    if duration < MIN_DURATION:
        raise ValueError(f"is shorter than {format_duration(MIN_DURATION)}, the minimum of the Kubernetes API")
    return duration


def _make(name: str, configuration: KubernetesCSRConfiguration, dependencies: IssuerDependencies) -> Issuer:
    from csi_driver.authority.issuers.kubernetes_csr.issuer import KubernetesCSRIssuer

    if dependencies.csrs is None:
        hint = "run the authority in a cluster, or remove the issuer"
        raise not_possible(name, "needs a cluster for its signer", hint)
    return KubernetesCSRIssuer(name, configuration, dependencies.credentials, dependencies.csrs)


KIND = IssuerKind(parse_kubernetes_csr, _make)
