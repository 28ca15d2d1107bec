"""One certificate: key, request, the authority's answer, and the judgement of it. Nothing is written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.certificates.root_sets import RootSet, trusted_root_set_names
from csi_driver.core.certificates.verification import parse_certificates, verify_certificate
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import Names
from csi_driver.core.renewal import plan_renewal
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, CertificateSpec, KeyType
from csi_driver.node.authority_messages import IssuanceResponse
from csi_driver.node.issuance.enrolled import Enrolled, Wanted
from csi_driver.node.issuance.pending import Pending, Prepared
from csi_driver.node.issuance.shared import Shared
from csi_driver.node.pods import Pod, PodToken
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume_files import expected_certificate


class Authority(Protocol):
    """Whoever signs."""

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        """As :meth:`csi_driver.node.authority_client.AuthorityClient.issue`."""


class Orders(Protocol):
    """Whoever finds keys of orders that are on their way since before the driver's start."""

    async def key_on_its_way(self, wanted: Wanted) -> PrivateKey | None:
        """As :meth:`csi_driver.node.issuance.live_certificates.LiveCertificates.key_on_its_way`."""


class Enrolment:
    """Obtains certificates. ``clock`` gives unix seconds, ``rng`` numbers from 0 to 1, ``keys`` the threads that make keys."""

    def __init__(
        self,
        authority: Authority,
        keys: Executor,
        clock: Callable[[], float],
        rng: Callable[[], float],
        *,
        pending: Pending,
        shared: Shared,
        orders: Orders,
    ) -> None:
        self._authority = authority
        self._keys = keys
        self._clock = clock
        self._rng = rng
        self._pending = pending
        self._shared = shared
        self._orders = orders

    async def obtain(
        self, volume_id: str, pod: Pod, spec: CertificateSpec, token: PodToken | None, late_s: float
    ) -> Enrolled:
        """A key and its certificate, for this volume alone or shared; ``late_s`` as for :func:`csi_driver.core.renewal.plan_renewal`.

        Raises:
            CertmountError: TokenMissing, TokenExpired, InvalidResponse, or the authority's own reason. After one that is
                worth another try, the next one is made with the same key and CSR.
        """
        usable = self._check_token(token)
        if not await self._shared.has(spec.issuer):
            return await self._ask(Wanted.of(pod, spec, volume_id), pod, spec, usable, late_s)
        wanted = Wanted.of(pod, spec)
        ask = partial(self._ask, wanted, pod, spec, usable, late_s)
        return await self._shared.obtain(wanted, spec, ask, first=math.isinf(late_s))

    async def _ask(self, wanted: Wanted, pod: Pod, spec: CertificateSpec, token: PodToken, late_s: float) -> Enrolled:
        prepared = await self._prepared(wanted, spec)
        # Before the question: a kubelet that loses its patience cancels the call, and the order goes on all the same.
        self._pending.keep(wanted, prepared)
        try:
            answer = await self._authority.issue(prepared.csr, token.text, spec)
            enrolled = self._judged(answer, prepared.key, pod, spec, late_s)
        except CertmountError as error:
            # An answer that does not fit would not fit another key better, and that would be another order.
            if not error.retryable:
                self._pending.drop(wanted)
            raise
        if not enrolled.interim:
            self._pending.drop(wanted)
        return enrolled

    async def _prepared(self, wanted: Wanted, spec: CertificateSpec) -> Prepared:
        if (found := self._pending.find(wanted)) is not None:
            return found
        key = await self._orders.key_on_its_way(wanted)
        return await in_thread(self._keys, _prepare, key, spec.key_type, spec.names)

    def _judged(
        self, answer: IssuanceResponse, key: PrivateKey, pod: Pod, spec: CertificateSpec, late_s: float
    ) -> Enrolled:
        now = self._clock()
        signer = DEFAULT_ISSUER if answer.interim else spec.issuer
        trust = _trust(answer, trusted_root_set_names(spec, interim=answer.interim))
        bundle = verify_certificate(
            answer.chain,
            trust[signer].roots,
            expected_certificate(key, spec, pod, signer),
            datetime.fromtimestamp(now, UTC),
        )
        not_after = bundle.leaf.not_valid_after_utc.timestamp()
        renew_at = plan_renewal(
            issued_at=now,
            not_after=not_after,
            renew_before_s=spec.renew_before.total_seconds() if spec.renew_before else None,
            renew_after_s=answer.renew_after.total_seconds() if answer.renew_after else None,
            jitter=self._rng(),
            late_s=late_s,
        )
        return Enrolled(key, bundle, trust, now, renew_at, not_after, answer.interim)

    def _check_token(self, token: PodToken | None) -> PodToken:
        if token is None:
            hint = "kubelet sends one with its next look at the volume; if this stays, see tokenRequests in the CSIDriver object"
            raise CertmountError(Reason.TOKEN_MISSING, Fault("pod token", "is not there yet", hint))
        if token.claims.expires_at <= self._clock():
            hint = "kubelet renews it at 80 % of its life; if this stays, see kubelet's log and the node's clock"
            raise CertmountError(Reason.TOKEN_EXPIRED, Fault("pod token", "has expired", hint))
        return token


def _trust(answer: IssuanceResponse, names: Sequence[str]) -> Mapping[str, RootSet]:
    """The sets that the volume is to trust, of which each one must have come."""
    if missing := [name for name in names if name not in answer.trust]:
        fault = Fault("certificate from the authority", f"came without the roots of {', '.join(missing)}")
        raise CertmountError(Reason.INVALID_RESPONSE, fault)
    trust = {name: answer.trust[name] for name in names}
    for name, roots in trust.items():
        parse_certificates(roots.roots, f"roots of {name}")
    return trust


def _prepare(key: PrivateKey | None, key_type: KeyType, names: Names) -> Prepared:
    key = key or generate_key(key_type)
    return Prepared(key, build_csr(key, names))
