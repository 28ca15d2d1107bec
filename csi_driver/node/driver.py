"""Create the components of the node driver and run their tasks."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from csi_driver.core.spec import KeyType
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.authority_client import AuthorityClient
from csi_driver.node.issuance.certificate_client import CertificateClient
from csi_driver.node.issuance.key_generator import KeyGenerator
from csi_driver.node.issuance.pending_requests import PendingRequests
from csi_driver.node.issuance.request_queue import RequestQueue
from csi_driver.node.issuance.shared_certificates import SharedCertificates
from csi_driver.node.issuance.stored_certificates import StoredCertificates
from csi_driver.node.log_shares import PodLogShares
from csi_driver.node.publishing.publish import Publisher
from csi_driver.node.publishing.published_volumes import PublishedVolumes
from csi_driver.node.publishing.restore import VolumeRestorer
from csi_driver.node.renewal.certificate_conditions import ConditionTracker
from csi_driver.node.renewal.certificate_reports import CertificateReporter
from csi_driver.node.renewal.early_renewals import EarlyRenewals
from csi_driver.node.renewal.reloads import ReloadRules, Reloads
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.status import NodeStatus
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.trust.trust_follower import follow_trust
from csi_driver.node.volumes.budget import VolumeBudget
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import VolumeTable
from csi_driver.rpc.authority_messages import TrustBundle
from csi_driver.telemetry.node_metrics import NodeMetrics


class Driver:
    """The node driver. ``clock`` returns unix seconds, ``rng`` numbers in [0, 1), and ``keys`` runs key generation.

    ``memory_limit`` is the memory limit of the process in bytes, including the files of all volumes.
    """

    def __init__(
        self,
        kubelet_dir: Path,
        node_name: str,
        store: VolumeStore,
        client: AuthorityClient,
        keys: Executor,
        metrics: NodeMetrics,
        memory_limit: int,
        reload_rules: ReloadRules,
        default_key_type: KeyType,
        clock: Callable[[], float],
        rng: Callable[[], float],
    ) -> None:
        self._client = client
        self._rng = rng
        self._metrics = metrics
        volumes, self.log_shares = VolumeTable(), PodLogShares()
        budget = VolumeBudget(store, memory_limit)
        self._remover = VolumeRemover(store, volumes, budget, clock, rng)
        self._roots = RootDistribution(store, volumes, self._remover, budget, metrics, clock, rng)

        self._stored = stored = StoredCertificates(store, volumes, lambda: self._roots.known, clock)
        queue = RequestQueue(client, clock, rng)
        self._pending = PendingRequests(time.monotonic)
        self._shared = SharedCertificates(stored.find, lambda: self._roots.known, clock)
        certificates = CertificateClient(queue, self._pending, self._shared, stored, KeyGenerator(keys), clock, rng)

        self._reporter = CertificateReporter(client.report, volumes.token_of, rng)
        self._conditions = ConditionTracker(volumes, self._remover, queue.outage, self._reporter, clock)
        self._renewals = Renewals(
            store,
            volumes,
            certificates,
            queue,
            self._roots,
            self._remover,
            self._conditions,
            budget,
            metrics,
            self.log_shares,
            clock,
            rng,
        )
        self._reloads = Reloads(reload_rules, volumes, self._reporter, metrics, self.log_shares, clock)
        self._early_renewals = EarlyRenewals(volumes, stored.key_fingerprint, self._renewals.renew_early)

        self.published = PublishedVolumes(kubelet_dir, store, volumes, self._renewals, budget)
        restorer = VolumeRestorer(
            node_name, store, volumes, self._roots, self._renewals, self._remover, budget, metrics, clock, rng
        )
        self.restore = restorer.restore
        self.publisher = Publisher(
            kubelet_dir,
            node_name,
            store,
            volumes,
            self.published,
            restorer,
            certificates,
            self._roots,
            self._renewals,
            budget,
            reload_rules,
            default_key_type,
            self.log_shares,
        )
        self.status = functools.partial(NodeStatus, node_name, store, volumes, self._renewals)
        metrics.count_waiting(queue.renewals_waiting)
        volumes.when_forgotten(metrics.forget)

    async def run(self) -> None:
        """Renew certificates and follow the authority's roots and policy until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renewals.scheduler.run(), name="renewals")
            tasks.create_task(self._conditions.expiry_checks.run(), name="expiry checks")
            tasks.create_task(self._reloads.run(), name="reload signals")
            tasks.create_task(self._reporter.run(), name="certificate reports")
            tasks.create_task(self._early_renewals.run(), name="early renewals")
            tasks.create_task(self._roots.scheduler.run(), name="root distribution")
            tasks.create_task(self._remover.retries.run(), name="volume removal")
            trust = follow_trust(self._client, self._apply, self._roots, self._rng, self._metrics.trust_reported)
            tasks.create_task(trust, name="trust bundles")

    def _apply(self, bundle: TrustBundle) -> None:
        # The authority ends the stream every half hour, so this also removes the keys of deleted pods regularly.
        self._pending.remove_expired()
        self._stored.replace_keys = bundle.replace_keys
        self._shared.update(bundle.shared_issuers, bundle.renew_now)
        self._early_renewals.update(bundle.renew_now)
        self._roots.apply_bundle(bundle.sets, bundle.environments)
        self._renewals.policy_received(bundle.policy_revision)
