"""Obtains the certificate of a volume: private key, CSR, issuance request, verification, renewal time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.certificates.root_sets import RootSet, trusted_root_set_names
from csi_driver.core.certificates.verification import parse_certificates, verify_certificate
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import Names
from csi_driver.core.renewal import plan_renewal
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from csi_driver.node.authority_messages import IssuanceResponse
from csi_driver.node.issuance.certificate_request import CertificateRequest, ObtainedCertificate, RequestKey
from csi_driver.node.issuance.pending_requests import PendingRequests, PreparedRequest
from csi_driver.node.issuance.request_queue import RequestQueue
from csi_driver.node.issuance.shared_certificates import SharedCertificates, ends_shared_request
from csi_driver.node.issuance.stored_certificates import StoredCertificates
from csi_driver.node.pods import PodToken
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume_files import expected_certificate


@dataclass(eq=False)
class CertificateClient:
    """Obtains certificates and does not write files. ``keys`` runs key generation, ``clock`` returns unix seconds."""

    queue: RequestQueue
    pending: PendingRequests
    shared: SharedCertificates
    stored: StoredCertificates
    keys: Executor
    clock: Callable[[], float]
    rng: Callable[[], float]

    async def obtain(self, request: CertificateRequest) -> ObtainedCertificate:
        """Return a certificate for the volume: its own, or the one that it shares with other volumes.

        Raises CertmountError: TokenMissing, TokenExpired, InvalidResponse or the authority's reason. After a retryable
        failure, the next request uses the same key and CSR.
        """
        token = self._valid_token(request.token)
        if not await self.shared.is_shared(request.spec.issuer):
            key = RequestKey.of(request.pod, request.spec, request.volume_id)
            return await self._request(key, request, token)
        key = RequestKey.of(request.pod, request.spec)
        obtain = partial(self._request, key, request, token)
        return await self.shared.obtain(key, request.spec, obtain, is_renewal=request.is_renewal)

    async def _request(self, key: RequestKey, request: CertificateRequest, token: PodToken) -> ObtainedCertificate:
        prepared = await self._prepare(key, request)
        # The kubelet can cancel the call, but the issuer continues. So store the request before it is sent.
        self.pending.put(key, prepared)
        try:
            response = await self._send(prepared, request, token)
            obtained = self._verify(response, prepared.key, request)
        except CertmountError as error:
            # InvalidResponse is retryable too: another key would not help, and would cause another order.
            if not error.retryable and (key.volume_id or ends_shared_request(error)):
                self.pending.remove(key)
            raise
        if not obtained.interim:
            self.pending.remove(key)
        return obtained

    async def _prepare(self, key: RequestKey, request: CertificateRequest) -> PreparedRequest:
        if (pending := self.pending.get(key)) is not None:
            return pending
        private_key = await self.stored.find_pending_key(key)
        return await in_thread(self.keys, _prepare_request, private_key, request.spec.key_type, request.spec.names)

    async def _send(self, prepared: PreparedRequest, request: CertificateRequest, token: PodToken) -> IssuanceResponse:
        if request.is_renewal:  # A renewal has waited for its turn already.
            return await self.queue.issue(prepared.csr, token.text, request.spec)
        return await self.queue.issue_first(prepared.csr, token.text, request.spec, request.pod.uid)

    def _verify(self, response: IssuanceResponse, key: PrivateKey, request: CertificateRequest) -> ObtainedCertificate:
        spec, now = request.spec, self.clock()
        signer = DEFAULT_ISSUER if response.interim else spec.issuer
        root_sets = _verify_root_sets(response, trusted_root_set_names(spec, interim=response.interim))
        verified = verify_certificate(
            response.chain,
            root_sets[signer].roots,
            expected_certificate(key, spec, request.pod, signer),
            datetime.fromtimestamp(now, UTC),
        )
        not_after = verified.leaf.not_valid_after_utc.timestamp()
        renew_at = plan_renewal(
            issued_at=now,
            not_after=not_after,
            renew_before_s=spec.renew_before.total_seconds() if spec.renew_before else None,
            renew_after_s=response.renew_after.total_seconds() if response.renew_after else None,
            jitter=self.rng(),
            late_s=request.late_s,
        )
        return ObtainedCertificate(key, verified, root_sets, now, renew_at, not_after, response.interim)

    def _valid_token(self, token: PodToken | None) -> PodToken:
        if token is None:
            hint = (
                "the kubelet sends a token when it republishes the volume; check tokenRequests in the CSIDriver object"
            )
            raise CertmountError(Reason.TOKEN_MISSING, Fault("pod token", "the kubelet has not sent it yet", hint))
        if token.claims.expires_at <= self.clock():
            hint = "the kubelet renews the token at 80% of its lifetime; check the kubelet's log and the node's clock"
            raise CertmountError(Reason.TOKEN_EXPIRED, Fault("pod token", "has expired", hint))
        return token


def _verify_root_sets(response: IssuanceResponse, names: Sequence[str]) -> Mapping[str, RootSet]:
    """Return the named root sets. Raise InvalidResponse if one is missing or does not parse."""
    if missing := [name for name in names if name not in response.trust]:
        fault = Fault("response of the authority", f"does not contain the roots of {', '.join(missing)}")
        raise CertmountError(Reason.INVALID_RESPONSE, fault)
    root_sets = {name: response.trust[name] for name in names}
    for name, root_set in root_sets.items():
        parse_certificates(root_set.roots, f"roots of {name}")
    return root_sets


def _prepare_request(key: PrivateKey | None, key_type: KeyType, names: Names) -> PreparedRequest:
    key = key or generate_key(key_type)
    return PreparedRequest(key, build_csr(key, names))
