"""When the next renewal of a volume starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest import mock

import pytest

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import VolumeFiles
from tests.support.scripted_authority import TestCA
from tests.support.waiting import in_background, until
from tests.unit.host.samples import record
from tests.unit.node.certificates import obtained_certificate


class World:
    """A volume whose renewal is due, and an authority that issues certificates for 100 s, to be renewed after 60 s."""

    def __init__(self) -> None:
        self.now, self.issued = 1000.0, 0
        self.volumes, self.roots = VolumeTable(), mock.create_autospec(RootDistribution, instance=True)
        self.roots.accept_response.return_value = {"acme": RootSet((TestCA().der,), 1)}
        remover = mock.create_autospec(VolumeRemover, instance=True)
        remover.remove_if_pod_is_gone.return_value = False
        client, queue = mock.Mock(), mock.Mock()
        client.obtain = self.obtain
        queue.renewal_turn = self.turn
        store, conditions, budget, metrics, logs = (mock.Mock() for _ in range(5))
        self.renewals = Renewals(
            store, self.volumes, client, queue, self.roots, remover, conditions, budget, metrics, logs,
            lambda: self.now, lambda: 0.5,
        )  # fmt: skip
        self.renewals.scheduler.elapsed = lambda: 0.0
        due = record(issued_at=900.0, renew_at=960.0, not_after=1000.0)
        self.volume = Volume(due, parse_attributes({"issuer": "acme"}))
        self.volumes.keep(self.volume)
        self.renewals.keep(self.volume)

    async def obtain(self, _request: object) -> object:
        self.issued += 1
        return obtained_certificate(self.now, self.now + 60.0, self.now + 100.0)

    @asynccontextmanager
    async def turn(self, *_: object) -> AsyncIterator[float]:
        yield 0.0


async def test_renewal_that_becomes_due_before_the_last_one_has_ended_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine was suspended meanwhile, or it is slow and the volume is renewed soon after it gets a certificate."""
    world = World()
    monkeypatch.setattr(VolumeFiles, "renew", mock.Mock())

    async def catch_up(_volume: Volume) -> None:
        if world.issued == 1:
            world.now += 3600.0
            world.renewals.scheduler._wake.set()  # as it does once a minute
            await asyncio.sleep(0.1)

    world.roots.catch_up.side_effect = catch_up
    async with in_background(world.renewals.scheduler.run()):
        await until(lambda: world.issued == 2, "the second renewal", timeout_s=3.0)
        await until(lambda: not world.volume.renewing, "the end of the second renewal")
        assert world.volume.failure is None
        assert world.renewals.scheduler.due(world.volume.record.volume_id) == world.now + 60.0
