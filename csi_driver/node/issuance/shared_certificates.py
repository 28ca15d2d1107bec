"""Certificates that pods of one service account on this node share, because their issuer limits the number of certificates.

Public CAs issue the same names only a few times a week. Twenty pods of a Deployment that start together send one request,
and a pod that restarts uses the existing certificate. Each volume still has its own files, with its own group.

Sharing does not give a pod more than the policy allows. Policy rules can depend on the pod's name, labels and Services.
Therefore the authority checks each pod with the pod's own token before it uses a shared certificate, see
:meth:`csi_driver.node.issuance.certificate_client.CertificateClient.obtain`. If the authority rejects a renewal, because of
the deny list or a new policy, the sharing ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.certificates.root_sets import RootSet, newest_root_sets, trusted_root_set_names
from csi_driver.core.errors import CertmountError, FailureKind, Fault, Reason, Scope
from csi_driver.core.renewal import plan_renewal
from csi_driver.core.shares import FairShares
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.node.issuance.certificate_request import ObtainedCertificate, RequestKey
from csi_driver.node.issuance.shared_cache import SharedCache

MAX_SHARED_CERTIFICATES = 1_000  # a node runs a few hundred pods
_BUNDLE_TIMEOUT_S = 20.0
"""How long to wait for the first trust bundle, which the authority sends about a second after the start."""
_ENDS_SHARING = (FailureKind.NOT_ALLOWED, FailureKind.DENIED)

Obtain = Callable[[], Awaitable[ObtainedCertificate]]


@dataclass(eq=False)
class SharedCertificates:
    """Shared certificates in memory.

    ``find`` looks for a certificate in the published volumes, ``known`` returns the newest root sets, and ``clock`` unix
    seconds.
    """

    find: Callable[[RequestKey], Awaitable[ObtainedCertificate | None]]
    known: Callable[[], Mapping[str, RootSet]]
    clock: Callable[[], float]
    max_certificates: int = MAX_SHARED_CERTIFICATES
    _requests: dict[RequestKey, asyncio.Future[ObtainedCertificate | CertmountError | None]] = field(
        default_factory=dict
    )
    _shared_issuers: Collection[str] = ()
    _renew_now: Collection[str] = ()
    _bundle_received: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        shares = FairShares("shared certificates on this node", self.max_certificates)
        # None if the sharing has ended. Then the volumes are not searched: they still contain the certificate.
        self._certificates: SharedCache[ObtainedCertificate | None] = SharedCache(shares)

    def update(self, shared_issuers: Collection[str], renew_now: Collection[str] = ()) -> None:
        """Store the issuers whose certificates are shared, and the fingerprints of keys that must be renewed now."""
        self._shared_issuers, self._renew_now = shared_issuers, renew_now
        self._bundle_received.set()
        self._remove_expired()

    async def is_shared(self, issuer: str) -> bool:
        """Return True if pods share the certificates of an issuer.

        Raises CertmountError: AuthorityUnavailable if no trust bundle arrives. Otherwise each pod of a Deployment could
        order its own certificate when the driver has just started.
        """
        if issuer == DEFAULT_ISSUER:
            return False
        try:
            async with asyncio.timeout(_BUNDLE_TIMEOUT_S):
                await self._bundle_received.wait()
        except TimeoutError:
            problem = f"the authority has not reported yet whether pods share certificates of issuer {issuer}"
            raise CertmountError(Reason.AUTHORITY_UNAVAILABLE, problem) from None
        return issuer in self._shared_issuers

    async def obtain(
        self, key: RequestKey, spec: CertificateSpec, obtain: Obtain, *, is_renewal: bool
    ) -> ObtainedCertificate:
        """Return the shared certificate, or the result of ``obtain``, which one volume calls for all.

        A renewal needs a certificate that is not due for renewal. For its first certificate, a volume also uses one that
        has recently become due, so that its pod can start.

        Raises CertmountError: the failure of ``obtain``, or FederationNotFound.
        """
        while True:
            if (shared := self._usable(key, spec, is_renewal=is_renewal)) is not None:
                return shared
            if (request := self._requests.get(key)) is None:
                return self._adapt(await self._obtain(key, spec, obtain, is_renewal=is_renewal), spec)
            result = await asyncio.shield(request)
            if isinstance(result, ObtainedCertificate):
                return self._adapt(result, spec)
            if result is not None:
                raise CertmountError(result.reason, *result.faults)

    async def _obtain(
        self, key: RequestKey, spec: CertificateSpec, obtain: Obtain, *, is_renewal: bool
    ) -> ObtainedCertificate:
        request = self._requests[key] = asyncio.get_running_loop().create_future()
        result: ObtainedCertificate | CertmountError | None = None
        try:
            if key not in self._certificates and (found := await self.find(key)) is not None:
                self._put(key, found)
            obtained = self._usable(key, spec, is_renewal=is_renewal)
            if obtained is None:
                obtained = await obtain()
                self._put(key, obtained)
            result = obtained
        except CertmountError as error:
            if error.reason.kind in _ENDS_SHARING:
                self.end(key)
            if _affects_other_volumes(error):
                result = error
            raise
        else:
            return obtained
        finally:
            del self._requests[key]
            request.set_result(result)

    def end(self, key: RequestKey) -> None:
        """End the sharing of a certificate: the next volume requests a new one."""
        if key in self._certificates:
            self._put(key, None)

    def _usable(self, key: RequestKey, spec: CertificateSpec, *, is_renewal: bool) -> ObtainedCertificate | None:
        shared = self._certificates.get(key)
        if shared is None or (self._renew_now and key_fingerprint(shared.key.public_key()) in self._renew_now):
            return None
        adapted = self._adapt(shared, spec)
        usable_until = adapted.renew_at if is_renewal else (adapted.renew_at + adapted.not_after) / 2
        if self.clock() >= usable_until:
            return None
        self._certificates.touch(key)
        return adapted

    def _adapt(self, obtained: ObtainedCertificate, spec: CertificateSpec) -> ObtainedCertificate:
        """Return the certificate with the root sets and the renewal time that a volume requests."""
        names = trusted_root_set_names(spec, interim=obtained.interim)
        sets = newest_root_sets(self.known(), obtained.root_sets)
        if unknown := [name for name in names if name not in sets]:
            faults = (Fault("federations", f"the authority has no federation {name}") for name in unknown)
            raise CertmountError(Reason.FEDERATION_NOT_FOUND, *faults)
        renew_at = obtained.renew_at
        if spec.renew_before is not None:
            requested = plan_renewal(
                issued_at=obtained.issued_at,
                not_after=obtained.not_after,
                renew_before=spec.renew_before,
                renew_after_s=None,
                jitter=0.5,
            )
            renew_at = min(renew_at, requested)
        return replace(obtained, root_sets={name: sets[name] for name in names}, renew_at=renew_at)

    def _put(self, key: RequestKey, obtained: ObtainedCertificate | None) -> None:
        self._remove_expired()
        self._certificates.put(key, obtained)

    def _remove_expired(self) -> None:
        now = self.clock()
        for key in self._certificates:
            shared = self._certificates.get(key)
            if shared and shared.not_after <= now:
                self._certificates.remove(key)


def ends_shared_request(error: CertmountError) -> bool:
    """Return True if a failure that is not retryable is final for all volumes of a shared certificate.

    Otherwise, other pods continue with the same key: a new key would cause another order.
    """
    return error.reason.kind in _ENDS_SHARING or _affects_other_volumes(error)


def _affects_other_volumes(error: CertmountError) -> bool:
    """Return True if the other volumes of a shared certificate would fail in the same way.

    Volumes of different pods share it, and they can request different federations (NOT_CONFIGURED).
    """
    kind = error.reason.kind
    return kind.scope is not Scope.POD and kind is not FailureKind.NOT_CONFIGURED
