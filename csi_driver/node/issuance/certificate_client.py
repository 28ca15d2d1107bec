"""Obtains the certificate of a volume: private key, CSR, issuance request, verification, renewal time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key, is_expensive
from csi_driver.core.certificates.root_sets import RootSet, trusted_root_set_names
from csi_driver.core.certificates.verification import (
    ExpectedCertificate,
    VerifiedCertificate,
    parse_certificates,
    verify_certificate,
)
from csi_driver.core.clocks import clock_error
from csi_driver.core.errors import CertmountError, FailureKind, Fault, Reason
from csi_driver.core.renewal import plan_renewal
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from csi_driver.node.issuance.certificate_request import CertificateRequest, ObtainedCertificate, RequestKey
from csi_driver.node.issuance.key_generator import KeyGenerator
from csi_driver.node.issuance.pending_requests import PendingRequests, PreparedRequest
from csi_driver.node.issuance.request_queue import RequestQueue
from csi_driver.node.issuance.shared_certificates import SharedCertificates, ends_shared_request
from csi_driver.node.issuance.stored_certificates import StoredCertificates
from csi_driver.node.pods import PodToken
from csi_driver.node.volumes.volume_files import expected_certificate
from csi_driver.rpc.authority_messages import IssuanceResponse

_MIN_SKEW_S = 1.0  # a smaller difference of the clocks is the time that the call took


@dataclass(eq=False)
class CertificateClient:
    """Obtains certificates and does not write files. ``clock`` returns unix seconds."""

    queue: RequestQueue
    pending: PendingRequests
    shared: SharedCertificates
    stored: StoredCertificates
    keys: KeyGenerator
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
        # The certificate can be another pod's, and the policy can treat the pods differently.
        try:
            await self._check(request, token)
        except CertmountError as error:
            if error.reason.kind is FailureKind.DENIED:  # The deny list applies to all pods that share the certificate.
                self.shared.end(key)
            raise
        obtain = partial(self._request, key, request, token)
        return await self.shared.obtain(key, request.spec, obtain, is_renewal=request.is_renewal)

    async def _request(self, key: RequestKey, request: CertificateRequest, token: PodToken) -> ObtainedCertificate:
        prepared = await self._prepare(key, request, token)
        # The kubelet can cancel the call, but the issuer continues. So store the request before it is sent.
        self.pending.put(key, prepared)
        try:
            response = await self._send(prepared, request, token)
            obtained = self._verify(response, prepared.key, request)
        except CertmountError as error:
            # InvalidResponse is retryable too: another key would not help, and would cause another order.
            final = not error.retryable and (key.volume_id or ends_shared_request(error))
            if final and not is_expensive(request.spec.key_type):
                self.pending.remove(key)
            raise
        if not obtained.interim:
            self.pending.remove(key)
        return obtained

    async def _prepare(self, key: RequestKey, request: CertificateRequest, token: PodToken) -> PreparedRequest:
        pending = self.pending.get(key)
        if pending is not None and not await self.stored.must_replace(key, pending.key):
            return pending
        spec, private_key = request.spec, await self.stored.find_key(key, reuse=request.spec.reuse_key)
        if private_key is None and is_expensive(spec.key_type):
            await self._check(request, token)
        keep = partial(self.pending.put, key)
        return await self.keys.prepare(request.pod, private_key, spec.key_type, spec.names, keep)

    async def _check(self, request: CertificateRequest, token: PodToken) -> None:
        """Ask the authority whether it would issue the certificate. The key of the CSR does not matter."""
        csr = build_csr(generate_key(KeyType.EC_P256), request.spec.names)
        if request.is_renewal:
            await self.queue.check(csr, token.text, request.spec)
        else:
            await self.queue.check_first(csr, token.text, request.spec, request.pod)

    async def _send(self, prepared: PreparedRequest, request: CertificateRequest, token: PodToken) -> IssuanceResponse:
        if request.is_renewal:  # A renewal has waited for its turn already.
            return await self.queue.issue(prepared.csr, token.text, request.spec)
        return await self.queue.issue_first(prepared.csr, token.text, request.spec, request.pod)

    def _verify(self, response: IssuanceResponse, key: PrivateKey, request: CertificateRequest) -> ObtainedCertificate:
        spec, now = request.spec, self.clock()
        signer = DEFAULT_ISSUER if response.interim else spec.issuer
        root_sets = _verify_root_sets(response, trusted_root_set_names(spec, interim=response.interim))
        verified = _verify_certificate(
            response, root_sets[signer], expected_certificate(key, spec, request.pod, signer), request, now
        )
        not_after = verified.leaf.not_valid_after_utc.timestamp()
        renew_at = plan_renewal(
            issued_at=now,
            not_after=not_after,
            renew_before=spec.renew_before,
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
            hint = (
                "the kubelet renews the token before it expires; check the kubelet's log, and compare the clocks of the "
                "node and the API server"
            )
            raise CertmountError(Reason.TOKEN_EXPIRED, Fault("pod token", "has expired", hint))
        return token


def _verify_certificate(
    response: IssuanceResponse,
    root_set: RootSet,
    expected: ExpectedCertificate,
    request: CertificateRequest,
    now: float,
) -> VerifiedCertificate:
    """Return the certificate. Raise InvalidResponse, or ClockSkew if it is valid at the authority's time."""

    def verify_at(time_s: float) -> VerifiedCertificate:
        return verify_certificate(response.chain, root_set.roots, expected, datetime.fromtimestamp(time_s, UTC))

    try:
        return verify_at(now)
    except CertmountError as error:
        if response.skew_s is None or abs(response.skew_s) < _MIN_SKEW_S:
            raise
        with contextlib.suppress(CertmountError):
            verify_at(now - response.skew_s)
            node = f"node {request.token.claims.node_name}" if request.token else "this node"
            error = clock_error(node, "the authority", response.skew_s, error.text)
        raise error from None


def _verify_root_sets(response: IssuanceResponse, names: Sequence[str]) -> Mapping[str, RootSet]:
    """Return the named root sets. Raise InvalidResponse if one is missing or does not parse."""
    if missing := [name for name in names if name not in response.trust]:
        fault = Fault("response of the authority", f"does not contain the roots of {', '.join(missing)}")
        raise CertmountError(Reason.INVALID_RESPONSE, fault)
    root_sets = {name: response.trust[name] for name in names}
    for name, root_set in root_sets.items():
        parse_certificates(root_set.roots, f"roots of {name}")
    return root_sets
