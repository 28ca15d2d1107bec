"""Interim certificates: a pod starts with a certificate of the internal CA while its external issuer works.

An issuer with the option ``while_pending`` allows them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta

from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError, Fault, Reason

_ISSUER_TIMEOUT_S = 5.0
"""An issuer that takes longer is pending: the pod must start."""
_MIN_RETRY_S, _MAX_RETRY_S = 15.0, 60.0
_AGE_PER_RETRY = 4
"""The next retry comes after a quarter of the time since the first request."""
_MAX_TRACKED = 10_000
_FORGET_AFTER_S = 3600.0


class InterimCertificates:
    """Limits the time that a pod waits for its issuer, and lets nodes retry less often for older requests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, timeout_s: float = _ISSUER_TIMEOUT_S) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._requests: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        """The times of the first and the last request, by public key."""

    async def issue(self, issuer: Issuer, request: IssuerRequest) -> IssuedCertificate:
        """Do what :meth:`Issuer.issue` does, but raise IssuancePending after 5 s if an interim certificate is allowed."""
        if issuer.while_pending is None:
            return await issuer.issue(request)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await issuer.issue(request)
        except TimeoutError:
            problem = f"the issuer takes longer than {self._timeout_s:.0f} s"
            raise CertmountError(Reason.ISSUANCE_PENDING, Fault("certificate", problem)) from None

    def retry_after(self, csr: ParsedCSR) -> timedelta:
        """Return when the node must request the issuer's certificate again."""
        now, key = self._clock(), _key(csr)
        first, last = self._requests.pop(key, (now, now))
        if now - last > _FORGET_AFTER_S:
            first = now
        self._requests[key] = first, now
        if len(self._requests) > _MAX_TRACKED:
            self._requests.popitem(last=False)
        return timedelta(seconds=min(max((now - first) / _AGE_PER_RETRY, _MIN_RETRY_S), _MAX_RETRY_S))

    def forget(self, csr: ParsedCSR) -> None:
        """Stop tracking a request whose certificate was issued."""
        if self._requests:
            self._requests.pop(_key(csr), None)


def _key(csr: ParsedCSR) -> bytes:
    return hashlib.sha256(public_bytes(csr.public_key)).digest()
