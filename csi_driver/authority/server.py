"""The authority's life: load the CA, publish its root, serve, follow changes, stop gracefully."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import grpc
import structlog

from csi_driver._proto import authority_pb2_grpc
from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.limits import RequestLimits
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_reviews import TokenReviewCache
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.authority.ca.authority import CertificateAuthority, utc_now
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.key_pairs import CAKeyPair
from csi_driver.authority.ca.keyring import DEFAULT_PROFILE, CAProfile, Keyring
from csi_driver.authority.ca.rotation import next_generation
from csi_driver.authority.ca.state import roots_pem
from csi_driver.authority.csr_api import CSRApi
from csi_driver.authority.csr_signer.decision import Decisions
from csi_driver.authority.csr_signer.leadership import Leadership
from csi_driver.authority.csr_signer.signer import CSRSigner
from csi_driver.authority.environment import Environment
from csi_driver.authority.issuance.pipeline import IssuancePipeline
from csi_driver.authority.issuers.internal.issuer import InternalIssuer
from csi_driver.authority.issuers.registry import IssuersFile
from csi_driver.authority.issuers.kubernetes_csr.access import Access
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.service import MAX_MESSAGE_BYTES, AuthorityService
from csi_driver.authority.trust.acknowledgements import AcknowledgementStore, AcknowledgingNodes
from csi_driver.authority.trust.bundles import LONGEST_WATCH, TrustBundles
from csi_driver.authority.trust.federation import FederationDirectory
from csi_driver.authority.trust.serving_certificate import ServingCertificate
from csi_driver.authority.trust.serving_root import current_serving_root
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import MAX_TOKEN_BYTES, ServiceAccount
from csi_driver.core.names import Names
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.rpc.server import Handled, Interceptor
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_GRACE_S = 10.0
_UNREADY_AFTER_S = 10.0
"""Of reviews that fail: one that is lost must not take a replica out of service."""
_FIRST_RETRY_S, _RETRY_CAP_S = 1.0, 15.0
_METADATA_BYTES = MAX_TOKEN_BYTES + 8 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # So that an over-long token is refused in our words, and not cut off by the transport.
    ("grpc.max_metadata_size", _METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
    # A second authority on the same port would otherwise start, and get half of the calls.
    ("grpc.so_reuseport", 0),
    # A node that vanished holds no trust stream for more than a minute or so; nodes may ask as often as we do.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Nodes find new replicas, as a connection would else last as long as its node; what is under way on it may end.
    ("grpc.max_connection_age_ms", int(timedelta(hours=1) / timedelta(milliseconds=1))),
    ("grpc.max_connection_age_grace_ms", int(LONGEST_WATCH * 1.1 / timedelta(milliseconds=1))),
)


@dataclass(frozen=True, slots=True)
class AuthoritySettings:
    """What an administrator decides, whatever the surroundings."""

    listen: str
    trust_domain: str
    cluster_domain: str
    policy: Path
    serving_names: Names
    node_account: ServiceAccount
    ca_design: CAProfile = DEFAULT_PROFILE
    """Of the CA that is made where there is none."""
    ca_files: Path | None = None
    """A folder with a CA that others look after."""
    ca_password_file: Path | None = None
    federation_dir: Path | None = None
    issuers: Path | None = None
    """The file that declares issuers beside the internal CA."""
    acme_http: str | None = None
    """Where CAs of the ACME kind find their HTTP-01 answers."""


class AuthorityServer:
    """Owns all parts of one replica."""

    def __init__(self, settings: AuthoritySettings, surroundings: Environment, metrics: AuthorityMetrics) -> None:
        self._settings = settings
        self._surroundings = surroundings
        self._metrics = metrics
        self._trust = TrustBundles(metrics)
        self._confirmations = AcknowledgementStore(surroundings.confirmations, lambda: self._ca.trust.generation)
        self._ca = CertificateAuthority(
            CAFiles(settings.ca_files, metrics, settings.ca_password_file) if settings.ca_files else surroundings.store,
            metrics,
            fleet=AcknowledgingNodes(self._confirmations, surroundings.nodes(self._trust), metrics),
            design=settings.ca_design,
            tell=lambda roots: self._trust.set_roots(DEFAULT_ISSUER, roots),
        )
        self._issuers = IssuersFile(
            settings.issuers,
            InternalIssuer(self._ca),
            replace(
                surroundings.tools,
                csrs=Access(surroundings.csrs.requests, lambda: self._ca.trust.roots) if surroundings.csrs else None,
            ),
            on_roots=self._set_roots,
            on_load=self._issuers_loaded,
            on_due=self._trust.set_renew_now,
        )
        self._federation = (
            FederationDirectory(settings.federation_dir, self._trust, metrics, time.time, self._issuers)
            if settings.federation_dir
            else None
        )
        self._policy = PolicyFile(
            settings.policy,
            metrics,
            trust_domain=settings.trust_domain,
            cluster_domain=settings.cluster_domain,
            on_change=self._trust.set_policy,
        )
        self._keys = TokenKeys(surroundings.fetch_keys, metrics)
        self._proofs = TokenReviewCache(TokenVerifier(self._keys), surroundings.reviewer, metrics)
        self._serving = ServingCertificate(settings.serving_names, metrics)
        self._server: grpc.aio.Server | None = None
        self._port = 0
        self._stopping = False
        self._generations: dict[str, int] = {}

    @property
    def port(self) -> int:
        """The port it serves on; 0 while it doesn't."""
        return self._port

    def unready(self) -> Sequence[str]:
        """Why it can't issue now, in words; may be called from any thread."""
        checks = (
            (self._stopping, "stopping"),
            (not self._policy.loaded, "no policy is loaded"),
            (not self._ca.usable, "there is no internal CA that is known to be current, with a valid intermediate"),
            (not self._keys.known, "the keys that the cluster signs tokens with are not known"),
            (self._reviews_fail(), "the API server does not answer reviews of tokens"),
            (not self._port, "not serving yet"),
        )
        return [*(reason for failed, reason in checks if failed), *self._surroundings.outdated()]

    def _reviews_fail(self) -> bool:
        since = self._proofs.failing_since
        return since is not None and time.time() - since > _UNREADY_AFTER_S

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until ``stop`` is set, then lets calls under way end.

        Raises:
            ExceptionGroup: of CertmountError or OSError, where it can't begin to serve and time won't help.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                life = tasks.create_task(self._live(), name="authority")
                await stop.wait()
                self._stopping = True
                log.info("stopping")
                self._trust.close()
                if self._server is not None:
                    await self._server.stop(_GRACE_S)
                life.cancel()
        finally:
            if self._server is not None:
                await self._server.stop(None)
        log.info("stopped")

    async def _live(self) -> None:
        await self._policy.load()
        await self._issuers.load()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._surroundings.run(), name="surroundings")
            tasks.create_task(self._confirmations.run(), name="confirmations")
            await _until_done(self._load_ca, "certificate authority not ready")
            if self._federation is not None:
                await self._federation.load()
                tasks.create_task(self._federation.run(), name="federation")
            await _until_done(self._keys.load, "token keys not ready")
            self._server = self._bound(await current_serving_root(self._surroundings.store, utc_now()))
            await self._server.start()
            log.info("serving", address=self._settings.listen, names=str(self._settings.serving_names))
            if self._settings.acme_http:
                tasks.create_task(self._answer_acme(self._settings.acme_http), name="HTTP-01")
            tasks.create_task(self._ca.run(self._adopt), name="ca")
            tasks.create_task(self._policy.run(), name="policy")
            tasks.create_task(self._issuers.run(), name="issuers")
            if (csrs := self._surroundings.csrs) is not None:
                tasks.create_task(self._csr_signer(csrs).run(), name="certificate signing requests")
            tasks.create_task(self._keys.run(), name="token keys")

    async def _load_ca(self) -> None:
        await self._adopt(await self._ca.refresh())

    async def _adopt(self, _keyring: Keyring) -> None:
        """Makes everything follow the CA. Each time, as what someone removed is so published again."""
        own = await current_serving_root(self._surroundings.store, utc_now())
        self._serving.refresh(own)
        authority = encode_certificates([own.certificate])
        await self._surroundings.publisher.publish(roots_pem(self._ca.trust), authority)

    def _csr_signer(self, cluster: CSRApi) -> CSRSigner:
        decisions = Decisions(
            cluster.pods, self._surroundings.subjects, lambda: self._policy.current, InternalIssuer(self._ca)
        )
        leadership = Leadership(cluster.lease, cluster.holder)
        ended = functools.partial(self._metrics.call_ended, "CertificateSigningRequest")
        return CSRSigner(cluster.requests, decisions, leadership, self._surroundings.events, ended)

    def _set_roots(self, issuer: str, roots: tuple[bytes, ...]) -> None:
        """Of an issuer outside: its latest roots are its newest."""
        self._generations[issuer] = next_generation(self._generations.get(issuer, 0), int(time.time()))
        self._trust.set_roots(issuer, RootSet(roots, self._generations[issuer]))

    def _issuers_loaded(self, taken: bool) -> None:
        self._metrics.issuers_loaded(taken)
        if taken:
            self._trust.set_shared_issuers(self._issuers.sharing)

    async def _answer_acme(self, address: str) -> None:
        """Answers HTTP-01 requests for ever; raises OSError where that port can't be listened on."""
        from csi_driver.authority.issuers.acme.challenge_server import ChallengeServer  # with aiohttp's server

        server = ChallengeServer(address, self._issuers.answering)
        await server.start()
        try:
            await asyncio.Event().wait()
        finally:
            await server.stop()

    def _bound(self, own: CAKeyPair) -> grpc.aio.Server:
        def observe(call: Handled) -> None:
            self._metrics.call_ended(call.method, call.seconds, call.reason)

        server = grpc.aio.server(interceptors=[Interceptor(observe)], options=_OPTIONS)
        desk = IssuancePipeline(
            admission=Authenticator(self._proofs, self._settings.node_account),
            limits=RequestLimits(),
            subjects=self._surroundings.subjects,
            policy=self._policy,
            issuers=self._issuers,
            metrics=self._metrics,
            events=self._surroundings.events,
            confirmations=self._confirmations,
            trust=self._trust,
        )
        authority_pb2_grpc.add_AuthorityServicer_to_server(AuthorityService(desk), server)
        try:
            self._port = server.add_secure_port(self._settings.listen, self._serving.credentials(own))
        except RuntimeError:
            raise OSError(f"--listen {self._settings.listen}: cannot be listened on; is the port in use?") from None
        return server


async def _until_done(step: Callable[[], Awaitable[None]], otherwise: str) -> None:
    """Repeats a step that fails for a reason that may pass."""
    delay = _FIRST_RETRY_S
    while True:
        try:
            return await step()
        except CertmountError as error:
            if not error.retryable:
                raise
            log.warning(otherwise, reason=error.reason.word, error=str(error), retry_in_s=delay)
        await asyncio.sleep(delay)
        delay = min(delay * 2, _RETRY_CAP_S)
