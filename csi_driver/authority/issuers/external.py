"""What an issuer outside the authority has besides signing: roots of its own, work in the background, and its troubles in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from csi_driver.authority.issuers import Issuer


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a dry run has looked at."""

    subject: str
    """What was looked at, in a word or two: ``reachable``, ``provisioner``."""
    ok: bool
    text: str
    """What was found; where that is bad, also what to do about it."""

    def __str__(self) -> str:
        return f"{'ok   ' if self.ok else 'WRONG'} {self.subject}: {self.text}"


class ExternalIssuer(Issuer, Protocol):
    """An issuer that is reached over the network.

    An order that outlasts a call raises CertmountError IssuancePending from :meth:`Issuer.issue`; the node asks again
    with the same request, and is then given the finished certificate.
    """

    @property
    def roots(self) -> tuple[bytes, ...]:
        """What its pods trust now: X.509 DER; none while that is not known."""

    @property
    def problem(self) -> str | None:
        """Why it can't issue now, for people; None while nothing stands against it."""

    @property
    def shares_certificates(self) -> bool:
        """True where pods of one service account on one node are to share a certificate, as the issuer counts each (ACME)."""

    async def run(self) -> None:
        """Its work in the background, such as fetching roots, until it is cancelled; then its connections are closed.

        Its failures are told by :attr:`problem`; it raises none. Orders are for an issuer whose work is under way.
        """

    async def check(self) -> list[Finding]:
        """A dry run: looks at all that issuing needs, and issues nothing. Failures are findings; it raises none.

        It needs no :meth:`run`, and leaves nothing open where there is none.
        """


@runtime_checkable
class Http01Responder(Protocol):
    """An issuer whose CA asks back over HTTP (RFC 8555 section 8.3)."""

    async def http_answer(self, token: str) -> str | None:
        """The key authorization for a token; None where there is none. Raises CertmountError where that can't be told."""


@runtime_checkable
class RenewalAdvisor(Protocol):
    """An issuer whose CA may want certificates renewed sooner than it said (RFC 9773)."""

    def due(self) -> tuple[str, ...]:
        """SHA-256 (hexadecimal) of the public keys (SubjectPublicKeyInfo) of those that are due now."""
