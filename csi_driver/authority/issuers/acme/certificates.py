"""Certificates of the CA: which chain to select, and when to renew: as the CA suggests (RFC 9773), or before the end."""

from __future__ import annotations

import asyncio
import functools
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import structlog
from acme import messages
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from csi_driver.authority.issuers.acme.client import PARSE_ERRORS as ACME_PARSE_ERRORS
from csi_driver.authority.issuers.acme.client import AcmeClient, AcmeProblem, OrderUnusable, parse
from csi_driver.authority.issuers.acme.context import AcmeContext
from csi_driver.authority.issuers.acme.state import AcmeState
from csi_driver.authority.issuers.external_issuer import decode_chain
from csi_driver.authority.issuers.key_encoding import encode_base64url
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.certificates.parsing import PARSE_ERRORS
from csi_driver.core.errors import CertmountError

_LETS_ENCRYPT = "Internet Security Research Group"
log = structlog.get_logger(__name__)
_LEAD = timedelta(days=30)
CHECK_S = 6 * 3600.0  # Between requests for renewal information without Retry-After (RFC 9773 section 4.3)
_MIN_CHECK_S, _MAX_CHECK_S = 60.0, 24 * 3600.0
_INTERVAL_S = 60.0
_MAX_LOGGED = 10  # Certificates that one line of the log names


def parse_chain(pem: bytes) -> tuple[x509.Certificate, ...]:
    try:
        return decode_chain(pem)
    except ValueError as error:
        raise AcmeProblem("", f"the response {error}") from None


def select_chain(chains: Sequence[tuple[x509.Certificate, ...]], preferred: str | None) -> tuple[x509.Certificate, ...]:
    for chain in chains:
        names = chain[-1].issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        if any(name.value == preferred for name in names):
            return chain
    return chains[0]


def check_chain(chain: Sequence[x509.Certificate], csr: bytes) -> None:
    request = x509.load_der_x509_csr(csr)
    try:
        names = {name.text for name in names_of(chain[0].extensions)}
        same_key = public_bytes(chain[0].public_key()) == public_bytes(request.public_key())  # type: ignore[arg-type]  # all keys have this method
    except PARSE_ERRORS:
        raise AcmeProblem("", "the certificate cannot be parsed") from None
    expected = {name.text for name in names_of(request.extensions)}
    if not same_key:
        # A CA can return one order for several requests with the same names, and another key was faster.
        raise OrderUnusable("the CA issued the certificate of the order for another key")
    if names != expected:
        raise AcmeProblem("", f"the certificate is for {', '.join(sorted(names))}, not {', '.join(sorted(expected))}")


def certificate_id(leaf: x509.Certificate) -> str:
    """Return the identifier for renewal information (RFC 9773 section 4.1); empty without an authority key identifier."""
    try:
        authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (x509.ExtensionNotFound, *PARSE_ERRORS):
        authority = None
    if authority is None:
        return ""
    serial = leaf.serial_number.to_bytes(leaf.serial_number.bit_length() // 8 + 1, "big")
    return ".".join(map(encode_base64url, (authority, serial)))


@functools.cache
def lets_encrypt_roots() -> tuple[bytes, ...]:
    """Return Let's Encrypt's own roots (X.509 DER) among the roots that verify connections to public CAs."""
    return tuple(
        root.public_bytes(Encoding.DER)
        for root in _parse_bundle(Path(DEFAULT_CA_BUNDLE_PATH).read_bytes())
        if any(name.value == _LETS_ENCRYPT for name in root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))
    )


def _parse_bundle(pem: bytes) -> Iterable[x509.Certificate]:
    end = b"-----END CERTIFICATE-----"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)  # some roots don't follow today's rules
        for block in pem.split(end)[:-1]:
            try:
                yield x509.load_pem_x509_certificate(block[block.index(b"-----BEGIN") :] + end)
            except PARSE_ERRORS:
                continue  # an unsupported root must not disable the others


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


async def fetch_window(client: AcmeClient, certificate_id: str, now: float) -> RenewalWindow | None:
    base = client.directory.to_partial_json().get("renewalInfo")
    if not base or not certificate_id:
        return None
    response = await client.fetch(f"{base.rstrip('/')}/{certificate_id}")
    try:
        suggested = parse(messages.RenewalInfo, response).suggested_window
        start, end = suggested.start.timestamp(), suggested.end.timestamp()
    except ACME_PARSE_ERRORS:
        raise AcmeProblem("", "the renewal information cannot be parsed") from None
    delay_s = CHECK_S if (requested_s := response.retry_after_s) is None else requested_s
    return RenewalWindow(start, end, now + min(max(delay_s, _MIN_CHECK_S), _MAX_CHECK_S))


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
        """Fetch the information that is due.

        If the CA cannot answer now, raise AcmeProblem or CertmountError; the rest waits until it is due again.
        """
        now, orders = self._context.clock(), self._context.orders
        if not any(one.check_at <= now < one.not_after for one in (await orders.read()).certificates):
            return
        due: list[str] = []

        def postpone(state: AcmeState) -> AcmeState:
            due.clear()
            for one in state.certificates:
                if one.check_at <= now < one.not_after:
                    due.append(one.certificate_id)
                    state = state.with_certificate(replace(one, check_at=now + CHECK_S))
            return state

        await orders.change(postpone)  # so that only one replica fetches each
        random.shuffle(due)  # If the CA fails at one of them again and again, the others are still asked for
        unavailable, text = [], ""
        async with self._context.accounts.connect() as client:
            for certificate_id in due:
                try:
                    window = await fetch_window(client, certificate_id, now)
                except AcmeProblem as problem:
                    if problem.code == "rateLimited" or problem.status == 429 or problem.status >= 500:
                        raise
                    # This certificate has no information, for instance because another environment of the CA issued it.
                    unavailable.append(certificate_id)
                    text = problem.text
                    continue
                if window is not None:
                    await self._update(certificate_id, window)
        if unavailable:
            examples = unavailable[:_MAX_LOGGED]
            count = len(unavailable)
            log.warning("ACME renewal information unavailable", count=count, certificates=examples, error=text)

    async def _update(self, certificate_id: str, window: RenewalWindow) -> None:
        jitter = random.random()  # noqa: S311  # spreads load

        def update(state: AcmeState) -> AcmeState:
            for one in state.certificates:
                if one.certificate_id == certificate_id:
                    renew_at = window.renewal_time(jitter, one.renew_at)
                    early = one.early or renew_at < one.renew_at
                    return state.with_certificate(
                        replace(one, renew_at=renew_at, check_at=window.check_at, early=early)
                    )
            return state

        await self._context.orders.change(update)
