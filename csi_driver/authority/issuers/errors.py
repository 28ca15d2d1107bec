"""The error that most failures of external issuers raise."""

from __future__ import annotations

from csi_driver.core.errors import CertmountError, Fault, Reason


def issuer_unavailable(field: str, problem: str, hint: str = "") -> CertmountError:
    """Return a CertmountError IssuerUnavailable with one fault."""
    return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(field, problem, hint))
