"""The steps of issuance that the pipelines and the CSR signer share, and interim certificates."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.authority.ca.certificates import BACKDATE
from csi_driver.authority.issuance.audit import AuditRecord
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.policy.subjects import PolicySubjectLookup
from csi_driver.authority.retry import retry_while_unavailable
from csi_driver.core.certificates.csr import ParsedCSR, content_faults
from csi_driver.core.certificates.keys import key_fingerprint, public_bytes
from csi_driver.core.certificates.lint import GrantedCertificate, LeafFields, lint
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, SecretIdentity
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import Grant, Policy, PolicySubject, RequestedCertificate
from csi_driver.core.shares import FairShares
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

_ISSUER_TIMEOUT_S = 5.0  # an issuer that takes longer is pending: the pod must start
_MIN_RETRY_S, _MAX_RETRY_S = 15.0, 60.0
_AGE_PER_RETRY = 4  # the next retry comes after a quarter of the time since the first request
MAX_INTERIM = 10_000
"""Interim certificates whose retries are tracked."""
_FORGET_AFTER_S = 3600.0


@dataclass(frozen=True, slots=True)
class IssuanceSteps:
    """Applies the policy and calls an issuer; each step fills in its fields of the audit record."""

    subjects: PolicySubjectLookup
    policy: Callable[[], Policy]  # returns the policy in force
    metrics: AuthorityMetrics

    async def find_subject(self, pod: PodIdentity, names: Names, record: AuditRecord) -> PolicySubject:
        with record.timed("policy_ms"):
            return await retry_while_unavailable(functools.partial(self.subjects.find, pod, names))

    async def find_secret(self, secret: SecretIdentity, record: AuditRecord) -> PolicySubject:
        with record.timed("policy_ms"):
            return await retry_while_unavailable(functools.partial(self.subjects.find_secret, secret))

    def apply_policy(self, subject: PolicySubject, requested: RequestedCertificate, record: AuditRecord) -> Grant:
        if requested.issuer != DEFAULT_ISSUER and (extra := requested.subject.beyond(requested.names)):
            text = ", ".join(attribute.text for attribute in extra)
            problem = f"{text}: certificates of {requested.issuer} have only DNS names as common name"
            hint = f"omit it, or use the issuer {DEFAULT_ISSUER}"
            raise CertmountError(requested.fields.reason, Fault(requested.fields.of("subject"), problem, hint))
        with record.timed("policy_ms"):
            grant = self.policy().decide(subject, requested)
        record.set_grant(grant)
        return grant

    async def sign(
        self,
        issuer: str,
        issue: Callable[[IssuerRequest], Awaitable[IssuedCertificate]],
        request: IssuerRequest,
        record: AuditRecord,
    ) -> IssuedCertificate:
        """Return the certificate that ``issue`` signs, and count it for the issuer.

        Raises CertmountError as ``issue``, and InvalidResponse for a certificate that must not leave the authority.
        """
        started = time.perf_counter()
        try:
            with record.timed("sign_ms"):
                issued = await issue(request)
                leaf = _checked(issuer, issued, request)
        except Exception as error:  # a call that its caller cancels does not count
            reason = error.reason if isinstance(error, CertmountError) else Reason.INTERNAL
            self.metrics.issuer_called(issuer, time.perf_counter() - started, reason)
            raise
        self.metrics.issuer_called(issuer, time.perf_counter() - started, None)
        record.set_leaf(leaf)
        return issued


def _checked(issuer: str, issued: IssuedCertificate, request: IssuerRequest) -> LeafFields:
    """Return the parts of the leaf; raises CertmountError InvalidResponse with all problems."""
    own, grant = issuer == DEFAULT_ISSUER, request.grant
    granted = GrantedCertificate(
        public_bytes(request.csr.public_key),
        request.csr.names,
        grant.names,
        grant.usages if own else None,
        (grant.duration + BACKDATE).total_seconds() if own else None,
    )
    leaf, problems = lint(issued.chain[0], granted)
    if leaf is None or problems:
        faults = (Fault(f"issuer {issuer}", f"the certificate {problem}") for problem in problems)
        raise CertmountError(Reason.INVALID_RESPONSE, *faults)
    return leaf


def select_issuer(issuers: Mapping[str, Issuer], name: str, csr: ParsedCSR) -> Issuer:
    """Return the issuer; raises CertmountError IssuerNotFound, or InvalidCSR for what only the internal CA can sign."""
    issuer = issuers.get(name)
    if issuer is None:
        hint = f"use one of {', '.join(sorted(issuers))}"
        raise CertmountError(Reason.ISSUER_NOT_FOUND, Fault("issuer", f"the authority has no issuer {name}", hint))
    # An external issuer may copy extensions from the CSR, which can come from a compromised node.
    if name != DEFAULT_ISSUER and (faults := content_faults(csr)):
        raise CertmountError(Reason.INVALID_CSR, *faults)
    return issuer


@dataclass(slots=True)
class _Tracked:
    owners: Sequence[str]
    first: float  # seconds of the monotonic clock
    last: float = 0.0


class InterimCertificates:
    """Limits the time that a pod waits for an issuer with ``while_pending``; nodes retry less often for older requests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, timeout_s: float = _ISSUER_TIMEOUT_S) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._shares = FairShares("interim certificates", MAX_INTERIM)
        self._tracked: OrderedDict[str, _Tracked] = OrderedDict()  # by public key; the latest request last

    async def issue(self, issuer: Issuer, request: IssuerRequest) -> IssuedCertificate:
        """Do what :meth:`Issuer.issue` does, but raise IssuancePending after 5 s if an interim certificate is allowed."""
        if issuer.while_pending is None:
            return await issuer.issue(request)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await issuer.issue(request)
        except TimeoutError:
            fault = Fault("certificate", f"the issuer takes longer than {self._timeout_s:.0f} s")
            raise CertmountError(Reason.ISSUANCE_PENDING, fault) from None

    def retry_after(self, request: IssuerRequest) -> timedelta:
        """Return when the node retries: after a quarter of the time since its first request, within bounds."""
        now = self._clock()
        while self._tracked and now - (oldest := next(iter(self._tracked.items())))[1].last > _FORGET_AFTER_S:
            self._forget(oldest[0])
        key = key_fingerprint(request.csr.public_key)
        tracked = self._tracked.get(key)
        if tracked is None:
            owners = request.identity.owners
            if not self._shares.try_take(owners):  # only these owners retry as seldom as for the oldest requests
                return timedelta(seconds=_MAX_RETRY_S)
            tracked = self._tracked[key] = _Tracked(owners, now)
        tracked.last = now
        self._tracked.move_to_end(key)
        return timedelta(seconds=min(max((now - tracked.first) / _AGE_PER_RETRY, _MIN_RETRY_S), _MAX_RETRY_S))

    def forget(self, request: IssuerRequest) -> None:
        if self._tracked:
            self._forget(key_fingerprint(request.csr.public_key))

    def _forget(self, key: str) -> None:
        if (tracked := self._tracked.pop(key, None)) is not None:
            self._shares.give_back(tracked.owners)
