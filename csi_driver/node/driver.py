"""The parts of the driver put together: who knows whom, and which clocks run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.authority_client import AuthorityClient
from csi_driver.node.authority_messages import TrustBundle
from csi_driver.node.issuance.enrolment import Enrolment
from csi_driver.node.issuance.first_calls import OUTSIDE_SIDE_BY_SIDE, Apart, FirstCalls
from csi_driver.node.issuance.lanes import Lanes
from csi_driver.node.issuance.live_certificates import LiveCertificates
from csi_driver.node.issuance.pending import Pending
from csi_driver.node.issuance.shared import Shared
from csi_driver.node.publishing.publish import Publisher
from csi_driver.node.renewal.advice import Advice
from csi_driver.node.renewal.conditions import Conditions
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.renewal.reports import Reports
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.trust.trust_follower import follow_trust
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import VolumeTable
from csi_driver.telemetry.node_metrics import NodeMetrics


class Driver:
    """All that a node does with volumes. ``clock`` gives unix seconds, ``rng`` numbers from 0 to 1, ``keys`` threads for keys."""

    def __init__(
        self,
        kubelet_dir: Path,
        store: VolumeStore,
        client: AuthorityClient,
        keys: Executor,
        metrics: NodeMetrics,
        clock: Callable[[], float],
        rng: Callable[[], float],
    ) -> None:
        self._client = client
        self._rng = rng
        volumes = VolumeTable()
        self._lanes = Lanes(clock, rng)
        paced = self._lanes.paced(client)
        self._first_calls = FirstCalls(paced, rng)
        self._first_calls_outside = FirstCalls(paced, rng, OUTSIDE_SIDE_BY_SIDE)
        self._removal = VolumeRemover(store, volumes, clock, rng)
        self._roots = RootDistribution(store, volumes, self._removal, metrics, clock, rng)
        metrics.count_waiting(self._lanes.backlog)
        live = LiveCertificates(store, volumes, lambda: self._roots.known, clock)
        self._pending = Pending(clock)
        self._shared = Shared(live, lambda: self._roots.known, clock)
        enrolment = partial(
            Enrolment,
            keys=keys,
            clock=clock,
            rng=rng,
            pending=self._pending,
            shared=self._shared,
            orders=live,
        )
        self._reports = Reports(client, rng)
        self._conditions = Conditions(volumes, self._removal, self._lanes, self._reports, clock)
        self._renewals = Renewals(
            store,
            volumes,
            enrolment(paced),
            self._roots,
            self._removal,
            self._lanes,
            self._conditions,
            metrics,
            clock,
            rng,
        )
        self._advice = Advice(store, volumes, self._renewals.advised)
        self.publisher = Publisher(
            kubelet_dir,
            store,
            volumes,
            enrolment(Apart(self._first_calls, self._first_calls_outside)),
            self._roots,
            self._renewals,
            self._removal,
            metrics,
            clock,
            rng,
        )

    async def run(self) -> None:
        """Renews, and follows the authority's roots and policy, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lanes.run(self._renewals.renew), name="renewals")
            tasks.create_task(self._first_calls.turns.run(), name="first calls")
            tasks.create_task(self._first_calls_outside.turns.run(), name="first calls to issuers outside")
            tasks.create_task(self._conditions.clock_of_ends.run(), name="ends")
            tasks.create_task(self._reports.run(), name="reports")
            tasks.create_task(self._advice.run(), name="advice")
            tasks.create_task(self._roots.writing.run(), name="roots")
            tasks.create_task(self._removal.again.run(), name="removals")
            tasks.create_task(follow_trust(self._client, self._take, self._roots, self._rng), name="trust")

    def _take(self, bundle: TrustBundle) -> None:
        # The stream begins anew each half hour, which is the clock of what memory holds for pods that may be gone.
        self._pending.forget_old()
        self._shared.streamed(bundle.shared_issuers, bundle.renew_now)
        self._advice.streamed(bundle.renew_now)
        self._roots.streamed(bundle.sets)
        self._renewals.policy_is(bundle.policy_revision)
