"""Certificates of the internal CA that a pod starts with while an issuer outside takes its time."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta

from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError, Fault, Reason

PATIENCE_S = 4.0
"""How long a pod that may start with a stand-in waits for its own certificate: a CA that knows the names needs no longer."""
AT_ONCE_S = 5.0
"""An issuer that has not said by then what it waits for is not listened to."""
_FIRST_S, _LAST_S = 15.0, 60.0
_GROWTH = 4
"""An order as old as this many pauses is asked for after another pause."""
_MOST = 10_000
_FORGOTTEN_S = 3600.0


def while_pending(issuer: Issuer) -> str | None:
    """Who signs while a certificate of the issuer is on its way: ``internal``, or None where the pod is to wait.

    An issuer says so by an attribute of this name; most have none.
    """
    named: str | None = getattr(issuer, "while_pending", None)
    return named


class InterimCertificates:
    """How long each order is waited for, by its key, so that nodes ask less often for an old one. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, at_once_s: float = AT_ONCE_S) -> None:
        self._clock = clock
        self._at_once_s = at_once_s
        self._since: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    async def issued_soon(self, issuer: Issuer, order: IssuerRequest) -> IssuedCertificate:
        """As :meth:`Issuer.issue`, but an issuer that a stand-in waits for is not waited for itself: IssuancePending."""
        if while_pending(issuer) is None:
            return await issuer.issue(order)
        try:
            async with asyncio.timeout(self._at_once_s):
                return await issuer.issue(order)
        except TimeoutError:
            problem = f"takes longer than {self._at_once_s:.0f} s"
            raise CertmountError(Reason.ISSUANCE_PENDING, Fault("certificate", problem)) from None

    def ask_again_after(self, order: IssuerRequest) -> timedelta:
        """When the node is to look whether the certificate is there."""
        now, key = self._clock(), _key(order)
        since, asked = self._since.pop(key, (now, now))
        if now - asked > _FORGOTTEN_S:
            since = now
        self._since[key] = since, now
        if len(self._since) > _MOST:
            self._since.popitem(last=False)
        return timedelta(seconds=min(max((now - since) / _GROWTH, _FIRST_S), _LAST_S))

    def over(self, order: IssuerRequest) -> None:
        """The certificate is there."""
        if self._since:
            self._since.pop(_key(order), None)


def _key(order: IssuerRequest) -> bytes:
    return hashlib.sha256(public_bytes(order.request.public_key)).digest()
