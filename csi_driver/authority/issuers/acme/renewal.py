"""When to renew a certificate: as the CA suggests (ARI, RFC 9773), or a fixed time before it expires."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from datetime import timedelta

import structlog
from acme import messages
from cryptography import x509
from josepy.errors import Error as JoseError

from csi_driver.authority.issuers.acme.client import AcmeClient, AcmeProblem, retry_after_s
from csi_driver.authority.issuers.acme.context import AcmeContext
from csi_driver.authority.issuers.acme.state import AcmeState
from csi_driver.core.errors import CertmountError

log = structlog.get_logger(__name__)

_LEAD = timedelta(days=30)
_CHECK_S = 6 * 3600.0  # Between requests for renewal information without Retry-After (RFC 9773 section 4.3)
_MIN_CHECK_S, _MAX_CHECK_S = 60.0, 24 * 3600.0
_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True)
class RenewalWindow:
    """The suggested renewal window, and when to fetch it again. Unix seconds."""

    start: float
    end: float
    check_at: float

    def renewal_time(self, jitter: float, planned: float | None = None) -> float:
        """Return the planned time if it is in the window, or else a time in it (RFC 9773 section 4.2); jitter is in [0, 1)."""
        if planned is not None and self.start <= planned <= self.end:
            return planned
        return self.start + jitter * max(self.end - self.start, 0.0)


def default_renewal_time(leaf: x509.Certificate) -> float:
    """Return 30 days before the end, or after two thirds of a lifetime shorter than 90 days. Unix seconds."""
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    return (leaf.not_valid_after_utc - min(_LEAD, lifetime / 3)).timestamp()


def fetch_window(client: AcmeClient, certificate_id: str, now: float) -> RenewalWindow | None:
    base = client.directory.to_partial_json().get("renewalInfo")
    if not base or not certificate_id:
        return None
    response = client.fetch(f"{base.rstrip('/')}/{certificate_id}")
    try:
        suggested = messages.RenewalInfo.from_json(response.json()).suggested_window
        start, end = suggested.start.timestamp(), suggested.end.timestamp()
    except (JoseError, ValueError, AttributeError):
        raise AcmeProblem("", "the renewal information cannot be parsed") from None
    delay_s = retry_after_s(response)
    delay_s = _CHECK_S if delay_s is None else delay_s
    return RenewalWindow(start, end, now + min(max(delay_s, _MIN_CHECK_S), _MAX_CHECK_S))


def next_check(now: float) -> float:
    return now + _CHECK_S


class RenewalInfoPoller:
    """Updates the renewal times of issued certificates from the CA's renewal information (RFC 9773 section 4.3)."""

    def __init__(self, context: AcmeContext) -> None:
        self._context = context

    async def run(self) -> None:
        while True:
            try:
                await self.poll()
            except (AcmeProblem, CertmountError) as error:
                log.warning("ACME renewal information unavailable", error=str(error))
            await asyncio.sleep(_INTERVAL_S)

    async def poll(self) -> None:
        """Fetch the information that is due; after AcmeProblem or CertmountError the rest waits until it is due again."""
        now, orders = self._context.clock(), self._context.orders
        if not any(one.check_at <= now < one.not_after for one in (await orders.read()).certificates):
            return
        due: list[str] = []

        def postpone(state: AcmeState) -> AcmeState:
            due.clear()
            for one in state.certificates:
                if one.check_at <= now < one.not_after:
                    due.append(one.certificate_id)
                    state = state.with_certificate(replace(one, check_at=next_check(now)))
            return state

        await orders.change(postpone)  # so that only one replica fetches each
        client = await self._context.accounts.connect()
        for certificate_id in due:
            window = await self._context.in_thread(fetch_window, client, certificate_id, now)
            if window is not None:
                await self._update(certificate_id, window)

    async def _update(self, certificate_id: str, window: RenewalWindow) -> None:
        jitter = random.random()  # noqa: S311  # spreads load

        def update(state: AcmeState) -> AcmeState:
            for one in state.certificates:
                if one.certificate_id == certificate_id:
                    renew_at = window.renewal_time(jitter, one.renew_at)
                    return state.with_certificate(replace(one, renew_at=renew_at, check_at=window.check_at))
            return state

        await self._context.orders.change(update)
