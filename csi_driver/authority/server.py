"""Build one replica of the authority and run it: load the CA, publish its root, serve, and stop gracefully."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import grpc
import structlog

from csi_driver._proto import authority_pb2_grpc
from csi_driver.authority.authn.authenticator import Authenticator, TokenReviewCache
from csi_driver.authority.authn.limits import RequestLimits
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.authority.ca.authority import CertificateAuthority, utc_now
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.certificates import CAKeyPair
from csi_driver.authority.ca.keyring import DEFAULT_PROFILE, CAProfile, Keyring
from csi_driver.authority.ca.rotation import next_generation
from csi_driver.authority.ca.sources import CASource, NodeAcknowledgements, StoredCA
from csi_driver.authority.ca.state import roots_pem
from csi_driver.authority.csr_api import CSRApi
from csi_driver.authority.csr_signer.csr_pipeline import CSRPipeline
from csi_driver.authority.csr_signer.leader_election import LeaderElection
from csi_driver.authority.csr_signer.signer import CSRSigner
from csi_driver.authority.environment import Environment
from csi_driver.authority.issuance.pipeline import IssuancePipeline
from csi_driver.authority.issuance.steps import IssuanceSteps
from csi_driver.authority.issuers.dependencies import CSRAccess, IssuerDependencies
from csi_driver.authority.issuers.internal.issuer import InternalIssuer
from csi_driver.authority.issuers.registry import IssuerRegistry
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.retry import retry
from csi_driver.authority.service import MAX_MESSAGE_BYTES, AuthorityService
from csi_driver.authority.storage import Store
from csi_driver.authority.trust.acknowledgements import AcknowledgementStore, AcknowledgingNodes
from csi_driver.authority.trust.bundles import LONGEST_WATCH, TrustBundles
from csi_driver.authority.trust.federation import FederationDirectory
from csi_driver.authority.trust.serving_certificate import ServingCertificate, current_serving_root
from csi_driver.core.backoff import Backoff
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import MAX_TOKEN_BYTES, ServiceAccount
from csi_driver.core.names import Names
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.rpc.server import Interceptor
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_GRACE_S = 10.0
_UNREADY_AFTER_S = 10.0  # a single failed TokenReview must not take a replica out of service
_START_BACKOFF = Backoff(1, 15)
_METADATA_BYTES = MAX_TOKEN_BYTES + 8 * 1024
_GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Larger than a token, so that the authority rejects an oversized token with a useful error.
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
    # Without this, a second authority could listen on the same port and get half of the calls.
    ("grpc.so_reuseport", 0),
    # Detects a node that vanished within about a minute, and allows nodes to ping at the same rate.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Makes nodes reconnect, so that they find new replicas; calls in progress can finish.
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", int(LONGEST_WATCH * 1.1 / timedelta(milliseconds=1))),
)


@dataclass(frozen=True, slots=True)
class AuthoritySettings:
    """The administrator's settings."""

    listen: str
    trust_domain: str
    cluster_domain: str
    policy: Path
    serving_names: Names
    node_account: ServiceAccount
    ca_profile: CAProfile = DEFAULT_PROFILE  # of the CA that the authority creates
    ca_files: Path | None = None  # a directory with a CA that another system maintains
    ca_password_file: Path | None = None
    federation_dir: Path | None = None
    issuers: Path | None = None
    acme_http: str | None = None  # the address for HTTP-01 requests of ACME CAs

    def policy_file(self, metrics: AuthorityMetrics, on_change: Callable[[str], None] = lambda _: None) -> PolicyFile:
        domains = {"trust_domain": self.trust_domain, "cluster_domain": self.cluster_domain}
        return PolicyFile(self.policy, metrics, **domains, on_change=on_change)

    def ca_source(self, store: Store, metrics: AuthorityMetrics, nodes: NodeAcknowledgements | None = None) -> CASource:
        if self.ca_files is not None:
            return CAFiles(self.ca_files, metrics, self.ca_password_file)
        return StoredCA(store, nodes, self.ca_profile)


class AuthorityServer:
    """Owns all parts of one replica."""

    def __init__(self, settings: AuthoritySettings, environment: Environment, metrics: AuthorityMetrics) -> None:
        self._settings, self._environment, self._metrics = settings, environment, metrics
        self._trust = TrustBundles(metrics)
        self._acknowledgements = AcknowledgementStore(
            environment.acknowledgement_store, lambda: self._ca.root_set.generation
        )
        nodes = AcknowledgingNodes(self._acknowledgements, environment.nodes(self._trust), metrics)
        self._ca = CertificateAuthority(
            settings.ca_source(environment.ca_store, metrics, nodes),
            metrics,
            on_roots_changed=functools.partial(self._trust.set_roots, DEFAULT_ISSUER),
        )
        self._internal = InternalIssuer(self._ca)
        self._issuers = IssuerRegistry(
            settings.issuers,
            self._internal,
            self._issuer_dependencies(),
            on_roots=self._set_issuer_roots,
            on_load=self._issuers_loaded,
            on_due=self._trust.set_renew_now,
        )
        self._policy = settings.policy_file(metrics, self._trust.set_policy)
        self._keys = TokenKeys(environment.fetch_keys, metrics)
        self._reviews = TokenReviewCache(TokenVerifier(self._keys), environment.reviewer, metrics)
        self._steps = IssuanceSteps(environment.subjects, lambda: self._policy.current, metrics)
        self._serving = ServingCertificate(settings.serving_names, metrics)
        self._server: grpc.aio.Server | None = None
        self.port, self._stopping = 0, False
        self._generations: dict[str, int] = {}

    def _issuer_dependencies(self) -> IssuerDependencies:
        api = self._environment.csr_api
        csrs = CSRAccess(api.requests, lambda: self._ca.root_set.roots) if api else None
        return replace(self._environment.issuer_dependencies, csrs=csrs)

    def unready(self) -> Sequence[str]:
        """Return why this replica cannot issue now, or nothing. Any thread may call it."""
        failing_since = self._reviews.failing_since
        checks = (
            (self._stopping, "stopping"),
            (not self._policy.loaded, "no policy is loaded"),
            (not self._ca.usable, "the internal CA is not loaded, outdated or expired"),
            (not self._keys.loaded, "the cluster's token keys are not loaded"),
            (failing_since is not None and time.time() - failing_since > _UNREADY_AFTER_S, "TokenReviews fail"),
            (not self.port, "not serving yet"),
        )
        return [*(reason for failed, reason in checks if failed), *self._environment.outdated()]

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, then let calls in progress finish; raises an ExceptionGroup if it cannot start."""
        try:
            async with asyncio.TaskGroup() as tasks:
                serving = tasks.create_task(self._serve(), name="authority")
                await stop.wait()
                self._stopping = True
                log.info("stopping")
                self._trust.close()
                if self._server is not None:
                    await self._server.stop(_GRACE_S)
                serving.cancel()
        finally:
            if self._server is not None:
                await self._server.stop(None)
        log.info("stopped")

    async def _serve(self) -> None:
        def delayed(error: CertmountError, delay_s: float) -> None:
            log.warning("start delayed", reason=error.reason.word, error=str(error), retry_in_s=delay_s)

        await self._policy.load()
        await self._issuers.load()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._environment.run(), name="environment")
            tasks.create_task(self._acknowledgements.run(), name="acknowledgements")
            await retry(self._load_ca, _START_BACKOFF, delayed)
            if (directory := self._settings.federation_dir) is not None:
                federation = FederationDirectory(directory, self._trust, self._metrics, time.time, self._issuers)
                await federation.load()
                tasks.create_task(federation.run(), name="federation")
            await retry(self._keys.load, _START_BACKOFF, delayed)
            self._server = self._bind(await current_serving_root(self._environment.ca_store, utc_now()))
            await self._server.start()
            log.info("serving", address=self._settings.listen, names=str(self._settings.serving_names))
            if self._settings.acme_http:
                tasks.create_task(self._serve_http01(self._settings.acme_http), name="HTTP-01")
            if (csr_api := self._environment.csr_api) is not None:
                tasks.create_task(self._csr_signer(csr_api).run(), name="CSR signer")
            tasks.create_task(self._ca.run(self._publish_ca), name="CA")
            for part in (self._policy, self._issuers, self._keys):
                tasks.create_task(part.run(), name=type(part).__name__)

    async def _load_ca(self) -> None:
        await self._publish_ca(await self._ca.refresh())

    async def _publish_ca(self, _keyring: Keyring) -> None:
        """Renew the serving certificate if it is due, and publish the roots again in case another client removed them."""
        root = await current_serving_root(self._environment.ca_store, utc_now())
        self._serving.refresh(root)
        await self._environment.publisher.publish(roots_pem(self._ca.root_set), encode_certificates([root.certificate]))

    def _csr_signer(self, api: CSRApi) -> CSRSigner:
        return CSRSigner(
            api.requests,
            CSRPipeline(api.find_pod, self._steps, self._internal),
            LeaderElection(api.lease, api.holder),
            self._environment.events,
            functools.partial(self._metrics.call_ended, "CertificateSigningRequest"),
        )

    def _set_issuer_roots(self, issuer: str, roots: tuple[bytes, ...]) -> None:
        self._generations[issuer] = next_generation(self._generations.get(issuer, 0), int(time.time()))
        self._trust.set_roots(issuer, RootSet(roots, self._generations[issuer]))

    def _issuers_loaded(self, valid: bool) -> None:
        self._metrics.issuers_valid.set(valid)
        if valid:
            self._trust.set_shared_issuers(self._issuers.sharing)
        else:
            self._metrics.issuers_reload_failures.inc()

    async def _serve_http01(self, address: str) -> None:
        """Respond to HTTP-01 requests until cancelled; raises OSError if the port is in use."""
        from csi_driver.authority.issuers.acme.http01 import ChallengeServer  # imports aiohttp's server

        server = ChallengeServer(address, self._issuers.external)
        await server.start()
        try:
            await asyncio.Event().wait()
        finally:
            await server.stop()

    def _bind(self, serving_root: CAKeyPair) -> grpc.aio.Server:
        interceptor = Interceptor(lambda call: self._metrics.call_ended(call.method, call.seconds, call.reason))
        server = grpc.aio.server(interceptors=[interceptor], options=_GRPC_OPTIONS)
        authenticator = Authenticator(self._reviews, self._settings.node_account)
        limits, events = RequestLimits(), self._environment.events
        pipeline = IssuancePipeline(authenticator, limits, self._issuers, self._trust, self._steps, events)
        service = AuthorityService(pipeline, authenticator, limits, self._trust, self._acknowledgements, events)
        authority_pb2_grpc.add_AuthorityServicer_to_server(service, server)
        try:
            self.port = server.add_secure_port(self._settings.listen, self._serving.credentials(serving_root))
        except RuntimeError:
            raise OSError(f"--listen {self._settings.listen}: cannot listen on it; is the port in use?") from None
        return server
