"""What becomes of one request: the checks in their order, then policy, then the internal CA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.authn.limits import Rate, RateLimiter
from csi_driver.authority.authn.token_reviews import retry_while_unavailable
from csi_driver.authority.csr_api import PodReader
from csi_driver.authority.csr_signer.request import Wish, read_wish
from csi_driver.authority.csr_signer.requester import check_live, requester_of
from csi_driver.authority.issuance.pipeline import SubjectLookup
from csi_driver.authority.issuers import Issuer, IssuerRequest
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.cluster.csr import ClusterCSR
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.policy.engine import Grant, Policy
from csi_driver.core.policy.rules import DEFAULT_DURATION
from csi_driver.core.spec import DEFAULT_ISSUER

ACCOUNT_RATE = Rate(2, 200)
"""Of one service account: a deployment of 200 pods at once, or a request every ten seconds from each of twenty."""


@dataclass(frozen=True, slots=True)
class Signed:
    """A certificate that may be handed out, and why."""

    certificate: bytes
    """PEM: the leaf, then its intermediates."""
    why: str
    """For people."""


class Decisions:
    """Judges requests for our own signer."""

    def __init__(
        self, pods: PodReader, subjects: SubjectLookup, policy: Callable[[], Policy], internal: Issuer
    ) -> None:
        self._pods = pods
        self._subjects = subjects
        self._policy = policy
        self._internal = internal
        self._limits = RateLimiter(ACCOUNT_RATE)

    async def decide(
        self, csr: ClusterCSR, own_username: str, record: dict[str, Any], *, again: bool = False
    ) -> Signed:
        """The certificate for a request, signed; what is found goes into ``record``. ``again`` is one that was counted before.

        Raises:
            CertmountError: why there is none; one that is not retryable, or TooManyRequests, is an answer to the requester.
        """
        record.update(csr=csr.name, issuer=DEFAULT_ISSUER, requester=csr.username)
        own = csr.username == own_username
        pod = _authority(csr) if own else requester_of(csr)
        account = pod.service_account
        if not own:
            record.update(
                namespace=account.namespace,
                service_account=account.name,
                pod=pod.pod_name,
                pod_uid=pod.pod_uid,
                node=pod.node_name,
            )
            if not again:
                self._count(csr.username)
        wish = read_wish(csr)
        record["asked"] = [str(name) for name in wish.request.names]
        record["key_sha256"] = key_fingerprint(wish.request.public_key)
        grant = _decided_before(wish) if own else await self._granted(pod, wish)
        record.update(names=[str(name) for name in grant.names], rules=grant.rules)
        issued = await self._internal.issue(IssuerRequest(wish.request, grant, pod, wish.asked))
        chain = [x509.load_der_x509_certificate(der) for der in issued.chain]
        record.update(
            serial=f"{chain[0].serial_number:x}", not_after=f"{chain[0].not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
        )
        pem = b"".join(one.public_bytes(Encoding.PEM) for one in chain)
        return Signed(pem, f"{grant.names} for {format_duration(grant.duration)}, by {', '.join(grant.rules)}")

    async def _granted(self, pod: PodIdentity, wish: Wish) -> Grant:
        account = pod.service_account
        check_live(
            pod, await retry_while_unavailable(functools.partial(self._pods.find, account.namespace, pod.pod_name))
        )
        subject = await retry_while_unavailable(functools.partial(self._subjects.find, pod))
        return self._policy().decide(subject, wish.asked)

    def _count(self, username: str) -> None:
        if self._limits.take(username):
            problem = "makes more requests than the authority allows"
            raise CertmountError(Reason.TOO_MANY_REQUESTS, Fault(username, problem, "make a new one in a minute"))


def _decided_before(wish: Wish) -> Grant:
    """For the authority's own requests, as an issuer over its own signer makes them: policy has let pass their names already.

    That is safe as the user name is stamped by the API server, and whoever has the authority's token can read the CA's key.
    Labels and annotations, which anyone may write on requests of their own, decide nothing.
    """
    if not len(wish.request.names):
        raise CertmountError(Reason.INVALID_CSR, Fault("spec.request", "names nothing"))
    return Grant(
        wish.request.names, wish.duration or DEFAULT_DURATION, wish.usages, ("the authority's own decision before",)
    )


def _authority(csr: ClusterCSR) -> PodIdentity:
    _, _, namespace, name = csr.username.split(":", 3)
    return PodIdentity(ServiceAccount(namespace, name), "", "", "", "", "", 0.0)
