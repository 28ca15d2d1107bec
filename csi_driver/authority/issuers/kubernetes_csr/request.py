"""An order as a CertificateSigningRequest: what can be asked for, and in which words."""

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

ISSUER_LABEL, ORDER_LABEL = "certmount.dev/issuer", "certmount.dev/order"
_MANAGED = {"app.kubernetes.io/managed-by": "certmount"}
_POD_NOTE, _NAMES_NOTE = "certmount.dev/pod", "certmount.dev/names"
_MAX_NOTE = 2048


def selector(issuer: str) -> str:
    """By which the issuer's own requests are found: ``kubectl get csr -l ...``."""
    return f"{ISSUER_LABEL}={issuer}"


def order_faults(order: IssuerRequest, configuration: KubernetesCSRConfiguration) -> list[Fault]:
    """Why it can't be asked for, told before anything is made."""
    faults: list[Fault] = []
    duration, least, most = order.grant.duration, configuration.min_duration, configuration.max_duration
    if duration < least:
        problem = f"{format_duration(duration)} is shorter than this issuer's least, {format_duration(least)}"
        faults.append(Fault("duration", problem))
    if most is not None and duration > most:
        problem = f"{format_duration(duration)} is longer than this issuer's most, {format_duration(most)}"
        faults.append(Fault("duration", problem))
    if not len(order.request.names):
        # The signer sees the node's request alone, and nothing can be added to that.
        own = ", ".join(str(uri) for uri in order.grant.names.uris)
        problem = "nothing is asked for, and a signer of the cluster signs what the request names"
        faults.append(Fault("name", problem, f"name what is needed, such as uri-sans: {own}"))
    return faults


def order_id(order: IssuerRequest) -> str:
    """The same for the same order, whichever replica gets it: for a label of at most 63 characters."""
    content = [
        public_bytes(order.request.public_key).hex(),
        order.identity.pod_uid,
        *(usage.value for usage in order.grant.usages),
        str(order.grant.duration.total_seconds()),
        *(str(name) for name in order.request.names),
    ]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:40]


def draft(issuer: str, configuration: KubernetesCSRConfiguration, order: IssuerRequest) -> CSRDraft:
    """The request that is to be made."""
    account, rsa_key = order.identity.service_account, isinstance(order.request.public_key, rsa.RSAPublicKey)
    return CSRDraft(
        name_prefix=f"certmount-{issuer[:40]}-",
        signer=configuration.signer,
        request=x509.load_der_x509_csr(order.request.der).public_bytes(Encoding.PEM),
        usages=(
            DIGITAL_SIGNATURE,
            *((KEY_ENCIPHERMENT,) if rsa_key else ()),
            *(PURPOSES[usage] for usage in order.grant.usages),
        ),
        life_s=int(order.grant.duration.total_seconds()),
        labels={**_MANAGED, ISSUER_LABEL: issuer, ORDER_LABEL: order_id(order)},
        annotations={
            _POD_NOTE: f"{account.namespace}/{order.identity.pod_name}",
            _NAMES_NOTE: str(order.request.names)[:_MAX_NOTE],
        },
    )
