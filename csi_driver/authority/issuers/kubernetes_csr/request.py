"""Translates a request into a CertificateSigningRequest."""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.cluster.csr import DIGITAL_SIGNATURE, KEY_ENCIPHERMENT, PURPOSES, CSRDraft
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import Fault

ISSUER_LABEL, REQUEST_LABEL = "certmount.dev/issuer", "certmount.dev/request"
_MANAGED = {"app.kubernetes.io/managed-by": "certmount"}
_POD_ANNOTATION, _NAMES_ANNOTATION = "certmount.dev/pod", "certmount.dev/names"
_MAX_ANNOTATION = 2048


def label_selector(issuer: str) -> str:
    """Return the selector of the issuer's own requests, for ``kubectl get csr -l``."""
    return f"{ISSUER_LABEL}={issuer}"


def request_faults(request: IssuerRequest, configuration: KubernetesCSRConfiguration) -> list[Fault]:
    faults: list[Fault] = []
    duration, minimum, maximum = request.grant.duration, configuration.min_duration, configuration.max_duration
    if duration < minimum:
        problem = f"{format_duration(duration)} is shorter than this issuer's minimum of {format_duration(minimum)}"
        faults.append(Fault("duration", problem))
    if maximum is not None and duration > maximum:
        problem = f"{format_duration(duration)} is longer than this issuer's maximum of {format_duration(maximum)}"
        faults.append(Fault("duration", problem))
    if not len(request.csr.names):
        # The signer gets the node's CSR, and the authority can't add names to that.
        own = ", ".join(str(uri) for uri in request.grant.names.uris)
        problem = "no name is requested, and a signer of the cluster signs only requested names"
        faults.append(Fault("name", problem, f"set the names, for example uri-sans: {own}"))
    return faults


def request_id(request: IssuerRequest) -> str:
    """Return a label value that is the same for the same request, so that every replica finds it."""
    content = [
        public_bytes(request.csr.public_key).hex(),
        request.identity.pod_uid,
        *(usage.value for usage in request.grant.usages),
        str(request.grant.duration.total_seconds()),
        *(str(name) for name in request.csr.names),
    ]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:40]


def csr_draft(issuer: str, configuration: KubernetesCSRConfiguration, request: IssuerRequest) -> CSRDraft:
    account, is_rsa = request.identity.service_account, isinstance(request.csr.public_key, rsa.RSAPublicKey)
    return CSRDraft(
        name_prefix=f"certmount-{issuer[:40]}-",
        signer=configuration.signer,
        request=x509.load_der_x509_csr(request.csr.der).public_bytes(Encoding.PEM),
        usages=(
            DIGITAL_SIGNATURE,
            *((KEY_ENCIPHERMENT,) if is_rsa else ()),
            *(PURPOSES[usage] for usage in request.grant.usages),
        ),
        expiration_s=int(request.grant.duration.total_seconds()),
        labels={**_MANAGED, ISSUER_LABEL: issuer, REQUEST_LABEL: request_id(request)},
        annotations={
            _POD_ANNOTATION: f"{account.namespace}/{request.identity.pod_name}",
            _NAMES_ANNOTATION: str(request.csr.names)[:_MAX_ANNOTATION],
        },
    )
