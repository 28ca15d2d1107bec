"""One certificate: key, request, the authority's answer, and the judgement of it. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from csi_driver.core.bundle import Bundle, Expected, check_answer, parse_certificates
from csi_driver.core.csr import build_csr
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.keys import PrivateKey, generate_key
from csi_driver.core.names import Names
from csi_driver.core.renewal import plan_renewal
from csi_driver.core.secret import Secret
from csi_driver.core.spec import CertificateSpec, KeyType
from csi_driver.core.trust import RootSet
from csi_driver.node.authority_client import Answer
from csi_driver.node.known_roots import trusted_names
from csi_driver.node.request import Pod, PodToken
from csi_driver.node.workers import in_thread


class Authority(Protocol):
    """Whoever signs."""

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> Answer:
        """As :meth:`csi_driver.node.authority_client.AuthorityClient.issue`."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A new key with a certificate that fits, and the sets that came with it for the pod to trust; times in unix seconds."""

    key: PrivateKey
    bundle: Bundle
    trust: Mapping[str, RootSet]
    issued_at: float
    renew_at: float
    not_after: float


class Enrolment:
    """Obtains certificates. ``clock`` gives unix seconds, ``chance`` numbers from 0 to 1, ``keys`` the threads that make keys."""

    def __init__(
        self, authority: Authority, keys: Executor, clock: Callable[[], float], chance: Callable[[], float]
    ) -> None:
        self._authority = authority
        self._keys = keys
        self._clock = clock
        self._chance = chance

    async def obtain(self, pod: Pod, spec: CertificateSpec, token: PodToken | None, late_s: float) -> Enrolled:
        """Makes a key and has it certified; ``late_s`` as for :func:`csi_driver.core.renewal.plan_renewal`.

        Raises:
            CertmountError: TokenMissing, TokenExpired, AnswerInvalid, or the authority's own reason.
        """
        usable = self._check_token(token)
        key, csr = await in_thread(self._keys, _prepare, spec.key_type, spec.names)
        answer = await self._authority.issue(csr, usable.text, spec)
        now = self._clock()
        expected = Expected(key.public_key(), spec.names, pod.namespace, pod.service_account)
        trust = _trust(answer, spec)
        bundle = check_answer(answer.chain, trust[spec.issuer].roots, expected, datetime.fromtimestamp(now, UTC))
        not_after = bundle.leaf.not_valid_after_utc.timestamp()
        renew_at = plan_renewal(
            issued_at=now,
            not_after=not_after,
            renew_before_s=spec.renew_before.total_seconds() if spec.renew_before else None,
            renew_after_s=answer.renew_after.total_seconds() if answer.renew_after else None,
            chance=self._chance(),
            late_s=late_s,
        )
        return Enrolled(key, bundle, trust, now, renew_at, not_after)

    def _check_token(self, token: PodToken | None) -> PodToken:
        if token is None:
            hint = "kubelet sends one with its next look at the volume; if this stays, see tokenRequests in the CSIDriver object"
            raise CertmountError(Reason.TOKEN_MISSING, Fault("pod token", "is not there yet", hint))
        if token.claims.expires_at <= self._clock():
            hint = "kubelet renews it at 80 % of its life; if this stays, see kubelet's log and the node's clock"
            raise CertmountError(Reason.TOKEN_EXPIRED, Fault("pod token", "has expired", hint))
        return token


def _trust(answer: Answer, spec: CertificateSpec) -> Mapping[str, RootSet]:
    """The sets that the volume is to trust, of which each one that was asked for must have come."""
    if missing := [name for name in trusted_names(spec) if name not in answer.trust]:
        fault = Fault("certificate from the authority", f"came without the roots of {', '.join(missing)}")
        raise CertmountError(Reason.ANSWER_INVALID, fault)
    trust = {name: answer.trust[name] for name in trusted_names(spec)}
    for name, roots in trust.items():
        parse_certificates(roots.roots, f"roots of {name}")
    return trust


def _prepare(key_type: KeyType, names: Names) -> tuple[PrivateKey, bytes]:
    key = generate_key(key_type)
    return key, build_csr(key, names)
