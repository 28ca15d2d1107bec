"""What external issuers share: periodic diagnostics, and checks of the certificates that they return."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest, issuer_unavailable
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.certificates.parsing import PARSE_ERRORS, extension_of, is_signed_by
from csi_driver.core.clocks import clock_error
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.spec import Usage
from csi_driver.core.texts import timestamp

log = structlog.get_logger(__name__)

MAX_CHAIN, MAX_CHAIN_BYTES = 10, 128 * 1024
DIAGNOSE_S = 60.0  # How fast new roots and replaced keys take effect
_DIAGNOSE_AFTER_PROBLEM_S = 5.0
_USAGES = {ExtendedKeyUsageOID.SERVER_AUTH: Usage.SERVER, ExtendedKeyUsageOID.CLIENT_AUTH: Usage.CLIENT}
_MIN_RENEW_AFTER = timedelta(minutes=1)
_CLOCK_TOLERANCE = timedelta(minutes=2)  # The issuer counts the lifetime from the time of its own clock


@dataclass(eq=False)
class DiagnosedIssuer(Issuer):
    """Repeats :meth:`diagnose`, which a subclass implements and which reports the result to :meth:`_report`."""

    name: str

    def __post_init__(self) -> None:
        self._problem: str | None = "diagnostics have not finished yet"
        self._diagnose_now = asyncio.Event()

    @property
    def problem(self) -> str | None:
        return self._problem

    async def _diagnose_periodically(self) -> None:
        while True:
            await self.diagnose()
            await self._maintain()
            self._diagnose_now.clear()
            if self._problem is not None:
                await asyncio.sleep(_DIAGNOSE_AFTER_PROBLEM_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DIAGNOSE_S):
                    await self._diagnose_now.wait()

    async def _maintain(self) -> None:
        """Do other periodic work after each diagnosis."""

    def _report(self, problem: str | None) -> None:
        if problem is None and self._problem is not None:
            log.info("issuer became available", issuer=self.name)
        elif problem != self._problem:
            log.warning("issuer has a problem", issuer=self.name, problem=problem)
        self._problem = problem
        if problem is not None:
            self._diagnose_now.set()

    def _unavailable(self, problem: str) -> CertmountError:
        hint = f"run `certmount issuer check {self.name}` for details"
        return issuer_unavailable(f"issuer {self.name}", problem, hint)


def decode_chain(pem: bytes) -> tuple[x509.Certificate, ...]:
    """Parse a chain, the leaf first; raise ValueError, in words that follow "the response"."""
    # The parser accepts any text around the certificates, so this counts no fewer than it would parse.
    if len(pem) > MAX_CHAIN_BYTES or pem.count(b"-----BEGIN") > MAX_CHAIN:
        raise ValueError(f"is longer than a chain of {MAX_CHAIN} certificates and {MAX_CHAIN_BYTES} bytes")
    try:
        return tuple(decode_certificates(pem))
    except ValueError:
        raise ValueError("is not a certificate chain") from None


def check_certificate(
    leaf: x509.Certificate, request: IssuerRequest, now: datetime, subject: str, hint: str = ""
) -> None:
    """Raise CertmountError InvalidResponse with all mismatches, or ClockSkew if the leaf is not valid now."""
    start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if not start <= now <= end:
        limit, words = (start, "is valid from") if now < start else (end, "expired at")
        problem = f"the certificate {words} {timestamp(limit)}"
        skew_s = abs((now - limit).total_seconds())
        raise clock_error("the authority", subject, skew_s, problem, at_least=True)
    faults = [Fault(subject, f"the certificate {problem}", hint) for problem in _problems(leaf, request, now)]
    if faults:
        raise CertmountError(Reason.INVALID_RESPONSE, *faults)


def issued_certificate(chain: Sequence[x509.Certificate], roots: tuple[bytes, ...], now: datetime) -> IssuedCertificate:
    """Return the result for a chain. If the leaf outlives the chain, renew it after two thirds of the chain's lifetime."""
    end = min(certificate.not_valid_after_utc for certificate in chain)
    outlives = chain[0].not_valid_after_utc > end
    renew_after = max((end - now) * 2 / 3, _MIN_RENEW_AFTER) if outlives else None
    ders = tuple(certificate.public_bytes(Encoding.DER) for certificate in chain)
    return IssuedCertificate(ders, roots, renew_after)


def _problems(leaf: x509.Certificate, request: IssuerRequest, now: datetime) -> list[str]:
    grant = request.grant
    try:
        key, names = leaf.public_key(), names_of(leaf.extensions)
    except PARSE_ERRORS:
        return ["cannot be parsed"]
    problems: list[str] = []
    if public_bytes(key) != public_bytes(request.csr.public_key):  # type: ignore[arg-type]  # all keys have this method
        problems.append("is for another key")
    if missing := sorted(str(name) for name in {*grant.names} - {*names}):
        problems.append(f"lacks {', '.join(missing)}")
    if unexpected := sorted(str(name) for name in {*names} - {*grant.names}):
        problems.append(f"also contains {', '.join(unexpected)}")
    constraints = extension_of(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        problems.append("is a CA certificate")
    ids = extension_of(leaf, x509.ExtendedKeyUsage) or ()
    usages = {_USAGES[one].value if one in _USAGES else one.dotted_string for one in ids}
    if usages != {usage.value for usage in grant.usages}:
        granted = " and ".join(sorted(usage.value for usage in grant.usages))
        problems.append(f"is for {' and '.join(sorted(usages)) or 'any usage'}, not for {granted}")
    if leaf.not_valid_after_utc > now + grant.duration + _CLOCK_TOLERANCE:
        problems.append(f"is valid until {timestamp(leaf.not_valid_after_utc)}, longer than the policy grants")
    return problems


def ends_at_root(chain: Sequence[x509.Certificate], roots: Sequence[bytes]) -> bool:
    """Return True if one of the roots (DER) is, or issued, the last certificate of a chain."""
    last = chain[-1]
    return any(last == root or is_signed_by(last, root) for root in map(x509.load_der_x509_certificate, roots))
