"""Issuers sign what admission and policy have let pass: one module each, behind one protocol.

They may not decide on names, and never see a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.identity import PodIdentity
from csi_driver.core.policy.engine import Grant, RequestedCertificate


@dataclass(frozen=True, slots=True)
class IssuerRequest:
    """What to sign: the key of a checked request, with what policy granted, for a proven pod."""

    request: ParsedCSR
    grant: Grant
    identity: PodIdentity
    asked: RequestedCertificate | None = None
    """In the pod's own words, for an issuer that can't give all that policy grants; None where that is not known."""


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """X.509 DER: ``chain`` is the leaf, then its intermediates; ``roots`` are what the pod is to trust."""

    chain: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    renew_after: timedelta | None = None
    """When the issuer wants it renewed, counted from now; None leaves it to the node."""
    identity_included: bool = True
    """False for an issuer that signs the DNS names only, such as a public CA: the leaf lacks the pod's SPIFFE ID."""


class Issuer(Protocol):
    """Signs orders."""

    async def issue(self, order: IssuerRequest) -> IssuedCertificate:
        """Signs; raises CertmountError IssuerUnavailable for what may pass, NameNotAllowed for what the issuer won't sign."""
