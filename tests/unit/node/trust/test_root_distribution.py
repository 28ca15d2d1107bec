"""Which root sets all volumes contain, and how long the driver waits for a quarantined volume."""

from __future__ import annotations

import asyncio
from typing import cast

from prometheus_client import CollectorRegistry

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.telemetry.node_metrics import NodeMetrics
from tests.support.scripted_authority import TestCA
from tests.unit.node.virtual_time import run_virtually

_ROOT = TestCA().der


class _Store:
    """The parts of VolumeStore that the tests need."""

    @staticmethod
    def key(volume_id: str) -> str:
        return volume_id


def _distribution(volumes: VolumeTable) -> RootDistribution:
    store = cast("VolumeStore", _Store())
    remover = VolumeRemover(store, volumes, lambda: 0.0, lambda: 0.5)
    return RootDistribution(store, volumes, remover, NodeMetrics(CollectorRegistry()), lambda: 0.0, lambda: 0.5)


def _volume(volumes: VolumeTable, volume_id: str, *federations: str) -> Volume:
    record = VolumeRecord(
        volume_id=volume_id,
        pod_namespace="web",
        pod_name="shop",
        pod_uid="uid",
        service_account="shop",
        attributes={},
        mount_group=None,
        targets=(),
        issued_at=0,
        renew_at=1,
        not_after=2,
    )
    volume = Volume(record, CertificateSpec(federations=federations))
    volumes.keep(volume)
    return volume


def _sets(**generations: int) -> dict[str, RootSet]:
    return {name: RootSet((_ROOT,), generation) for name, generation in generations.items()}


def test_root_set_is_written_when_all_volumes_that_trust_it_contain_it() -> None:
    """Each set counts separately. A set that no volume trusts is written immediately."""
    volumes = VolumeTable()
    roots, one, two = _distribution(volumes), _volume(volumes, "one"), _volume(volumes, "two", "partner")
    roots.apply_bundle(_sets(internal=3, partner=4, unused=5))
    assert roots.written() == {"unused": 5}
    one.root_sets = _sets(internal=3)
    two.root_sets = _sets(internal=2, partner=4)
    assert roots.written() == {"unused": 5, "partner": 4}
    two.root_sets = _sets(internal=4, partner=3)
    assert roots.written() == {"unused": 5, "internal": 3}
    volumes.forget("two")
    assert roots.written() == {"unused": 5, "internal": 3, "partner": 4}


def test_response_before_the_first_bundle_does_not_mark_other_volumes_as_written() -> None:
    """The other volume trusts the set too, but does not contain it yet."""
    volumes = VolumeTable()
    roots, one = _distribution(volumes), _volume(volumes, "one")
    _volume(volumes, "two", "partner")
    one.root_sets = roots.accept_response(one.trusted_names, _sets(internal=3))
    assert roots.written() == {}


def test_quarantined_volume_delays_acknowledgement_for_180_seconds() -> None:
    """If its pod were running, the kubelet would have republished the volume by then."""
    roots = _distribution(VolumeTable())

    async def scenario() -> list[dict[str, int]]:
        roots.await_adoption(["lost"])
        roots.apply_bundle(_sets(internal=1))
        written = [dict(roots.written())]
        await asyncio.sleep(179)
        written.append(dict(roots.written()))
        await roots.changed()
        await asyncio.sleep(2)
        await roots.changed()
        written.append(dict(roots.written()))
        return written

    assert run_virtually(scenario()) == [{}, {}, {"internal": 1}]


def test_quarantined_volume_counts_until_it_is_adopted_or_unpublished() -> None:
    """After that, all volumes are known."""
    volumes = VolumeTable()
    roots = _distribution(volumes)

    async def scenario() -> None:
        roots.await_adoption(["adopted", "unpublished"])
        roots.apply_bundle(_sets(internal=1))
        adopted = _volume(volumes, "adopted")
        adopted.root_sets = _sets(internal=1)
        roots.check_restored(adopted)
        assert roots.written() == {}
        volumes.forget("unpublished")
        assert roots.written() == {"internal": 1}

    run_virtually(scenario())


def test_roots_of_a_removed_issuer_stay_in_its_volumes() -> None:
    """The certificate chains to them. Other sets are updated. A volume without its issuer's set is not written."""
    volumes = VolumeTable()
    roots, volume = _distribution(volumes), _volume(volumes, "one", "partner")
    roots.apply_bundle(_sets(internal=1, partner=1))
    volume.root_sets = _sets(internal=1, partner=1)
    roots.apply_bundle(_sets(partner=2))
    assert roots._required_sets(volume) == _sets(internal=1, partner=2)
    volume.root_sets = {}
    assert roots._required_sets(volume) == {}
    assert not roots._is_outdated(volume)


def test_response_contains_the_issuers_roots_even_if_the_stream_removed_them() -> None:
    """The stream can come from another replica than the response."""
    roots = _distribution(VolumeTable())
    for sets in (_sets(internal=1), _sets(internal=2, partner=3), _sets(partner=3)):
        roots.apply_bundle(sets)
    assert roots.accept_response(("internal", "partner"), _sets(internal=2, partner=3)) == _sets(internal=2, partner=3)
