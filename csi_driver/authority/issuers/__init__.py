"""Issuers sign what authentication and policy have allowed. Each kind is one package that implements :class:`Issuer`.

An issuer doesn't decide which names are allowed, and never gets a token.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import Requester
from csi_driver.core.policy.engine import Grant, RequestedCertificate


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of checking one thing."""

    subject: str  # What was checked, in one or two words, such as `provisioner`
    ok: bool
    text: str  # What was found; if it is not ok, also what to do

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.subject}: {self.text}"


class Findings(list[Finding]):
    """The findings of one diagnosis, in the order of the checks."""

    def add(self, subject: str, ok: bool, text: str) -> None:
        self.append(Finding(subject, ok, text))

    @property
    def problem(self) -> str | None:
        """Everything that is not ok in one line, or None."""
        return "; ".join(f"{finding.subject}: {finding.text}" for finding in self if not finding.ok) or None


@dataclass(frozen=True, slots=True)
class IssuerRequest:
    """A certificate to sign: the key of a verified CSR, with what the policy grants an authenticated pod or Secret."""

    csr: ParsedCSR
    grant: Grant
    identity: Requester
    requested: RequestedCertificate | None = None  # What was requested; None if unknown
    tsig_secret: str = ""  # NAMESPACE/NAME of the Secret whose TSIG key changes DNS; empty: the issuer's own key

    @property
    def acme_email(self) -> str:
        """The address of the ACME account that orders it; empty: the issuer's own account."""
        email = self.requested and self.requested.acme_email
        return email.text if email else ""


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """X.509 DER: ``chain`` is the leaf and its intermediates, ``roots`` are the roots that the pod must trust."""

    chain: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    renew_after: timedelta | None = None  # When the issuer wants it renewed, from now; None if the node decides


class Issuer(ABC):
    """One issuer. The defaults fit an issuer that signs immediately and does no background work."""

    shares_certificates: bool = False  # By pods of a service account on a node, as the issuer limits how many it signs
    needs_names_in_csr: bool = True  # It cannot sign PodCertificateRequests, whose CSRs contain only a key
    has_accounts: bool = False  # Whether a request can name an ACME account and a TSIG key
    own_email: str = ""  # The address of its own account, which every request can use; empty if it has none
    while_pending: str | None = None  # The issuer of interim certificates while this issuer works; None if pods wait

    @property
    @abstractmethod
    def roots(self) -> tuple[bytes, ...]:
        """X.509 DER of the roots that its pods trust now; empty while they are unknown."""

    @property
    @abstractmethod
    def environment(self) -> str:
        """Where its certificates come from, such as the URL of a CA's directory. If it changes, they must be replaced."""

    @property
    def problem(self) -> str | None:
        """Why it can't issue now, for people; None if no problem is known."""
        return None

    @abstractmethod
    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        """Return the certificate. An external issuer accepts requests while :meth:`run` is running.

        Raises CertmountError NameNotAllowed if the issuer doesn't sign such a request, IssuancePending if the next call
        with the same request continues the work, or IssuerUnavailable.
        """

    async def run(self) -> None:
        """Do the background work, such as fetching roots, until cancelled; report failures as :attr:`problem`."""
        await asyncio.Event().wait()

    async def diagnose(self) -> Findings:
        """Check everything that issuing needs, and issue nothing. Failures are findings. It does not need :meth:`run`."""
        return Findings()

    async def http01_response(self, token: str) -> str | None:  # noqa: ARG002
        """Return the key authorization for a known HTTP-01 token (RFC 8555 section 8.3); raise CertmountError."""
        return None

    def renewals_due(self) -> tuple[str, ...]:
        """Return the SHA-256 (hex) of the public keys (DER) whose certificates the CA wants renewed now (RFC 9773)."""
        return ()

    def keys_to_replace(self) -> tuple[str, ...]:
        """Return those of :meth:`renewals_due` that the CA wants earlier than it first said, as after a revocation."""
        return ()


def issuer_unavailable(field: str, problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(field, problem, hint))
