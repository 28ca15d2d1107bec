"""Translates a request into the names of an order, and finds what an ACME CA does not sign."""

from __future__ import annotations

from collections.abc import Sequence

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.spec import KeyType, Usage


def order_names(request: IssuerRequest, configuration: AcmeConfiguration) -> tuple[str, ...]:
    """Return the DNS names to order; raise CertmountError NameNotAllowed with everything that the CA can't sign."""
    names, grant, requested = request.csr.names, request.grant, request.requested
    key_type = request.csr.key_type
    faults = [
        Fault(str(name), "public CAs do not sign this kind of name", "use another issuer for it")
        for name in (*names.uris, *names.ips, *names.emails)
    ]
    if not names.dns:
        hint = "an ACME certificate contains only the names in volumeAttributes"
        faults.append(Fault("name", "no DNS name is requested", hint))
    elif set(names.dns) != set(grant.names.dns):
        faults.append(Fault("name", "the policy grants other DNS names than the CSR contains"))
    if Usage.SERVER not in grant.usages or (requested is not None and Usage.CLIENT in requested.usages):
        hint = "use another issuer, or set usages: server"
        faults.append(Fault("usages", "public CAs no longer sign client certificates", hint))
    if requested is not None and requested.duration is not None:
        hint = "omit it; an administrator can select one of the CA's profiles"
        faults.append(Fault("duration", "the ACME CA determines the lifetime", hint))
    if key_type in (KeyType.ML_DSA_44, KeyType.ML_DSA_65, KeyType.ML_DSA_87):
        hint = "use another issuer or another key type"
        faults.append(Fault("key-type", f"ACME CAs do not sign {key_type.value} keys yet", hint))
    texts = tuple(sorted(name.text for name in names.dns))
    if configuration.dns01 is None:
        faults += wildcard_faults(texts)
    if faults:
        raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)
    return texts


def wildcard_faults(names: Sequence[str]) -> list[Fault]:
    """Return a fault for each wildcard, which HTTP-01 does not support (RFC 8555 section 8.3)."""
    problem, hint = "HTTP-01 does not support wildcards", "ask an administrator to configure dns01 for the issuer"
    return [Fault(name, problem, hint) for name in names if name.startswith("*.")]
