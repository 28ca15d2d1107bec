"""What a node driver requests from the authority, and the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.authority.issuers import IssuedCertificate
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, Usage

MAX_SET_NAME = 253
"""Characters in the name of an issuer or a federation, as in the name of a Kubernetes object."""
_MAX_FEDERATIONS = 32


@dataclass(frozen=True, slots=True)
class IssuanceRequest:
    """A certificate that a node driver requests for a pod. Nothing in it is verified."""

    node_token: Secret[str]
    pod_token: Secret[str]
    csr: bytes
    """PKCS#10, DER."""
    duration: timedelta | None = None
    usages: tuple[Usage, ...] = ()
    issuer: str = DEFAULT_ISSUER
    federations: tuple[str, ...] = ()
    conversion_faults: tuple[Fault, ...] = ()
    """What could not be converted from the wire. It is reported after authentication, together with other faults."""

    def faults(self) -> list[Fault]:
        """Return all faults that can be found without parsing the CSR."""
        faults = list(self.conversion_faults)
        if len(self.federations) > _MAX_FEDERATIONS:
            faults.append(Fault("federations", f"has more than {_MAX_FEDERATIONS} entries"))
        if any(not 0 < len(name) <= MAX_SET_NAME for name in (self.issuer, *self.federations)):
            faults.append(Fault("issuer, federations", f"has a name that is empty or longer than {MAX_SET_NAME}"))
        return faults


@dataclass(frozen=True, slots=True)
class IssuanceResult:
    """A certificate and the root sets that the pod needs, by name."""

    issued: IssuedCertificate
    trust: Mapping[str, RootSet]
    pending: CertmountError | None = None
    """Set for an interim certificate: why the issuer's certificate is pending."""
