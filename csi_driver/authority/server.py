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
from prometheus_client import CollectorRegistry

from csi_driver._proto import authority_pb2_grpc
from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.limits import RequestLimits
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_review_cache import TokenReviewCache
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.authority.ca.authority import CertificateAuthority, utc_now
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.certificates import CAKeyPair
from csi_driver.authority.ca.keyring import DEFAULT_PROFILE, CAProfile, Keyring
from csi_driver.authority.ca.rotation import next_generation
from csi_driver.authority.ca.sources import CASource, NodeAcknowledgements, StoredCA
from csi_driver.authority.callers import CallerAuthentication, method_label
from csi_driver.authority.csr_api import CSRApi
from csi_driver.authority.csr_signer.csr_pipeline import CSRPipeline
from csi_driver.authority.csr_signer.signer import CSRSigner
from csi_driver.authority.diagnostics import (
    DiagnosticCheck,
    ca_check,
    issuers_check,
    policy_check,
    token_keys_check,
)
from csi_driver.authority.environment import Environment
from csi_driver.authority.issuance.pipeline import IssuancePipeline
from csi_driver.authority.issuance.secret_pipeline import SecretPipeline
from csi_driver.authority.issuance.steps import IssuanceSteps
from csi_driver.authority.issuers.dependencies import CSRAccess, IssuerDependencies
from csi_driver.authority.issuers.internal.issuer import InternalIssuer
from csi_driver.authority.issuers.registry import IssuerRegistry
from csi_driver.authority.pod_certificates.api import PodCertificateApi, PodSigner
from csi_driver.authority.pod_certificates.namespaces import NamespaceRoots
from csi_driver.authority.pod_certificates.pipeline import PodCertificatePipeline
from csi_driver.authority.pod_certificates.publisher import BundlePublisher, PublishedAcknowledgements
from csi_driver.authority.pod_certificates.signer import PodCertificateSigner
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.retry import retry
from csi_driver.authority.secrets_service import SecretsService
from csi_driver.authority.service import MAX_MESSAGE_BYTES, AuthorityService
from csi_driver.authority.status import AuthorityStatus
from csi_driver.authority.storage import Store
from csi_driver.authority.trust.acknowledgements import AcknowledgementStore, AcknowledgingNodes
from csi_driver.authority.trust.bundles import LONGEST_WATCH, TrustBundles
from csi_driver.authority.trust.federation import FederationDirectory
from csi_driver.authority.trust.serving_certificate import ServingCertificate, current_serving_root
from csi_driver.core.backoff import Backoff
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import encode_certificates, encode_der_certificates
from csi_driver.core.identity import MAX_TOKEN_BYTES, ServiceAccount
from csi_driver.core.names import Names
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.kube.leader_election import LeaderElection
from csi_driver.rpc.issue_stream_server import IssueStreamServer
from csi_driver.rpc.server import CallRecorder, Interceptor
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_GRACE_S = 10.0
_UNREADY_AFTER_S = 10.0  # a single failed TokenReview must not take a replica out of service
_START_BACKOFF = Backoff(1, 15)
_METADATA_BYTES = MAX_TOKEN_BYTES + 8 * 1024
MAX_CONNECTIONS = 5_000
"""All nodes of the largest supported cluster (Kubernetes: 5,000). If a process in a pod opens all of them, they use 225 MB."""
_GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Larger than a token, so that the authority rejects an oversized token with a useful error.
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
    # Without this, a second authority could listen on the same port and get half of the calls.
    ("grpc.so_reuseport", 0),
    # Bounds what callers can hold without authentication: connections (45 kB each) and handshakes that do not end.
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # What gRPC buffers of a call that does not read, such as a rejected one with a delayed answer. It buffers more of a
    # message that is read. With the probe, it would enlarge the buffer to several MB for fast callers.
    ("grpc.http2.lookahead_bytes", 16 * 1024),
    ("grpc.http2.bdp_probe", 0),
    # For a connection. Of a node's calls, most can be first requests to external issuers; a single namespace has 128.
    ("grpc.max_concurrent_streams", 256),
    # Beyond the first number, gRPC rejects calls at random that the event loop has not accepted yet.
    ("grpc.server.max_pending_requests", 4_000),
    ("grpc.server.max_pending_requests_hard_limit", 8_000),
    ("grpc.max_connection_idle_ms", 300_000),  # a node always has a WatchTrust stream
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
    secrets_account: ServiceAccount | None = None  # of the Secrets controller; None: it is not served
    pod_signers: tuple[PodSigner, ...] = ()  # of PodCertificateRequests; none: they are not signed
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


def checks_of(
    settings: AuthoritySettings, environment: Environment, metrics: AuthorityMetrics
) -> Sequence[DiagnosticCheck]:
    """Return the checks of everything that an authority with these settings needs, except its external issuers."""
    return [
        policy_check(settings.policy_file(metrics)),
        *([issuers_check(settings.issuers)] if settings.issuers else []),
        ca_check(settings.ca_source(environment.ca_store, metrics)),
        token_keys_check(environment.fetch_keys),
        *environment.checks,
    ]


class AuthorityServer:
    """Owns all parts of one replica."""

    def __init__(self, settings: AuthoritySettings, environment: Environment, metrics: AuthorityMetrics) -> None:
        self._settings, self._environment, self._metrics = settings, environment, metrics
        self._trust = TrustBundles(metrics)
        self._acknowledgements = AcknowledgementStore(
            environment.acknowledgement_store, lambda: self._ca.root_set.generation
        )
        nodes = self._acknowledging(AcknowledgingNodes(self._acknowledgements, environment.nodes(self._trust)))
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
        self._issuers_known = settings.issuers is None  # a file counts when it is loaded
        metrics.issuers_valid.set(self._issuers_known)
        self._policy = settings.policy_file(metrics, self._trust.set_policy)
        self._keys = TokenKeys(environment.fetch_keys, metrics)
        self._reviews = TokenReviewCache(TokenVerifier(self._keys), environment.reviewer, metrics)
        # New for each diagnosis, and with separate metrics: a check changes nothing.
        checks = functools.partial(checks_of, settings, environment, AuthorityMetrics(CollectorRegistry()))
        self.status = AuthorityStatus(self._ca, nodes, self._trust, self._issuers, self._policy, self.unready, checks)
        self._steps = IssuanceSteps(environment.subjects, lambda: self._policy.current, metrics)
        self._serving = ServingCertificate(settings.serving_names, metrics)
        self._server: grpc.aio.Server | None = None
        self._streams: IssueStreamServer | None = None
        self._federation: FederationDirectory | None = None
        self.port, self._stopping = 0, False
        self._generations: dict[str, int] = {}

    def _acknowledging(self, nodes: NodeAcknowledgements) -> NodeAcknowledgements:
        """Return what a rotation waits for: the nodes, and the ClusterTrustBundle if pods can use it."""
        api, signers = self._environment.pod_certificate_api, self._settings.pod_signers
        return (
            PublishedAcknowledgements(nodes, api.bundles(signers[0].name), api.namespaces) if api and signers else nodes
        )

    def _issuer_dependencies(self) -> IssuerDependencies:
        api = self._environment.csr_api
        csrs = CSRAccess(api.requests, lambda: self._ca.root_set.roots) if api else None
        return replace(self._environment.issuer_dependencies, csrs=csrs, order_counter=self._metrics.acme_order_counter)

    def unready(self) -> Sequence[str]:
        """Return why this replica cannot issue now, or nothing. Any thread may call it."""
        checks = (
            (self._stopping, "stopping"),
            (not self._policy.loaded, "no policy is loaded"),
            (not self._ca.usable, "the internal CA is not loaded, outdated or expired"),
            (not self._keys.loaded, "the cluster's token keys are not loaded"),
            (self._reviews.failing_s > _UNREADY_AFTER_S, "TokenReviews fail"),
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
                if self._streams is not None:
                    self._streams.close()
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
        self._trust.set_issuers(self._issuers.sharing, self._issuers.environments)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._environment.run(), name="environment")
            tasks.create_task(self._acknowledgements.run(), name="acknowledgements")
            await retry(self._load_ca, _START_BACKOFF, delayed)
            if (directory := self._settings.federation_dir) is not None:
                self._federation = FederationDirectory(directory, self._trust, self._metrics, time.time, self._issuers)
                await self._federation.load()
                tasks.create_task(self._federation.run(), name="federation")
            await retry(self._keys.load, _START_BACKOFF, delayed)
            self._server = self._bind(await current_serving_root(self._environment.ca_store, utc_now()))
            await self._server.start()
            log.info("serving", address=self._settings.listen, names=str(self._settings.serving_names))
            if self._settings.acme_http:
                tasks.create_task(self._serve_http01(self._settings.acme_http), name="HTTP-01")
            if (csr_api := self._environment.csr_api) is not None:
                tasks.create_task(self._csr_signer(csr_api).run(), name="CSR signer")
            if self._environment.pod_certificate_api is not None and self._settings.pod_signers:
                signer = self._pod_signer(self._environment.pod_certificate_api)
                tasks.create_task(signer.run(), name="pod certificate signer")
            tasks.create_task(self._ca.run(self._publish_ca), name="CA")
            for part in (self._policy, self._issuers, self._keys):
                tasks.create_task(part.run(), name=type(part).__name__)

    async def _load_ca(self) -> None:
        await self._publish_ca(await self._ca.refresh())

    async def _publish_ca(self, _keyring: Keyring) -> None:
        """Renew the serving certificate if it is due, and publish the roots again in case another client removed them."""
        root = await current_serving_root(self._environment.ca_store, utc_now())
        self._serving.refresh(root)
        roots = encode_der_certificates(self._ca.root_set.roots)
        await self._environment.publisher.publish(roots, encode_certificates([root.certificate]))

    def _csr_signer(self, api: CSRApi) -> CSRSigner:
        return CSRSigner(
            api.requests,
            CSRPipeline(api.find_pod, self._steps, self._internal),
            LeaderElection(api.lease, api.holder),
            self._environment.events,
            functools.partial(self._metrics.call_ended, "CertificateSigningRequest"),
        )

    def _pod_signer(self, api: PodCertificateApi) -> PodCertificateSigner:
        signers = self._settings.pod_signers
        return PodCertificateSigner(
            api,
            PodCertificatePipeline(
                api.find_pod, self._steps, self._issuers, {signer.name: signer.issuer for signer in signers}
            ),
            BundlePublisher(api.bundles(signers[0].name), self._trust, self._is_root_set),
            NamespaceRoots(api.config_maps, self._trust, api.namespaces, self._is_root_set),
            LeaderElection(api.lease, api.holder),
            self._environment.events,
            functools.partial(self._metrics.call_ended, "PodCertificateRequest"),
        )

    def _is_root_set(self, name: str) -> bool:
        """Return whether an issuer or a federation of this name is, or may be, configured. Its roots may not be known yet."""
        federated = self._federation is not None and self._federation.may_contain(name)
        return not self._issuers_known or name in self._issuers or federated

    def _set_issuer_roots(self, issuer: str, roots: tuple[bytes, ...]) -> None:
        self._generations[issuer] = next_generation(self._generations.get(issuer, 0), int(time.time()))
        self._trust.set_roots(issuer, RootSet(roots, self._generations[issuer]))

    def _issuers_loaded(self, valid: bool) -> None:
        self._issuers_known |= valid  # an invalid file changes nothing
        self._metrics.issuers_valid.set(valid)
        if valid:
            self._trust.set_issuers(self._issuers.sharing, self._issuers.environments)
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
        limits, events = RequestLimits(), self._environment.events
        recorder = CallRecorder(
            lambda call: self._metrics.call_ended(call.method, call.seconds, call.reason, cancelled=call.cancelled),
            callers=limits,
        )
        self._streams = IssueStreamServer(recorder)
        secrets_account = self._settings.secrets_account
        authenticator = Authenticator(self._reviews, self._settings.node_account, secrets_account)
        authenticate = CallerAuthentication(authenticator, limits)
        interceptor = Interceptor(recorder, label=method_label, authenticate=authenticate)
        server = grpc.aio.server(interceptors=[interceptor], options=_GRPC_OPTIONS)
        pipeline = IssuancePipeline(authenticator, limits, self._issuers, self._trust, self._steps, events)
        acknowledgements = self._acknowledgements
        service = AuthorityService(
            pipeline, authenticator, limits, self._trust, acknowledgements, events, self._streams
        )
        authority_pb2_grpc.add_AuthorityServicer_to_server(service, server)
        if secrets_account is not None:
            secrets = SecretPipeline(authenticator, limits, self._issuers, self._trust, self._steps)
            authority_pb2_grpc.add_SecretsServicer_to_server(SecretsService(secrets, limits, self._trust), server)
        try:
            self.port = server.add_secure_port(self._settings.listen, self._serving.credentials(serving_root))
        except RuntimeError:
            raise OSError(f"--listen {self._settings.listen}: cannot listen on it; is the port in use?") from None
        return server
