"""What the node driver reports to the authority, without protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique

from csi_driver.core.secret import Secret


@unique
class CertificateCondition(Enum):
    """A condition of a pod's certificate that the authority reports as a pod event."""

    RENEWAL_FAILING = "the renewal failed twice in a row"
    RENEWAL_OVERDUE = "half of the time between the renewal time and the expiry has passed without a renewal"
    CERTIFICATE_EXPIRED = "the certificate has expired"
    CERTIFICATE_RECOVERED = "the certificate was renewed after one of the other conditions"
    RENEWAL_STOPPED = "the policy denies certificates to the pod, and the driver has stopped renewing"
    RELOAD_FAILED = "the files were replaced, but the process that the volume names could not be signalled"


@dataclass(frozen=True, slots=True)
class CertificateReport:
    """A change of a certificate's condition. ``token`` identifies the pod."""

    token: Secret[str]
    condition: CertificateCondition
    reason: str
    message: str
