"""What all volumes hold, and for how long a volume that nobody can look at is waited for."""

from __future__ import annotations

import asyncio
from typing import cast

from prometheus_client import CollectorRegistry

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.spec import CertificateSpec
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
    """As much of a store as the bookkeeping asks for."""

    @staticmethod
    def key(volume_id: str) -> str:
        return volume_id


def _roots(volumes: VolumeTable) -> RootDistribution:
    store = cast("VolumeStore", _Store())
    removal = VolumeRemover(store, volumes, lambda: 0.0, lambda: 0.5)
    return RootDistribution(store, volumes, removal, NodeMetrics(CollectorRegistry()), lambda: 0.0, lambda: 0.5)


def _volume(volume_id: str, *federations: str) -> Volume:
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
    return Volume(record, CertificateSpec(federations=federations))


def _sets(**generations: int) -> dict[str, RootSet]:
    return {name: RootSet((_ROOT,), generation) for name, generation in generations.items()}


def test_a_set_is_held_when_all_who_trust_it_have_it() -> None:
    """Each set by itself: one that no volume trusts is held at once, and what one volume lacks holds up no other set."""
    volumes = VolumeTable()
    roots, one, two = _roots(volumes), _volume("one"), _volume("two", "partner")
    volumes.keep(one)
    volumes.keep(two)
    roots.apply_bundle(_sets(internal=3, partner=4, unused=5))
    assert roots.written() == {"unused": 5}
    one.root_sets = _sets(internal=3)
    two.root_sets = _sets(internal=2, partner=4)
    assert roots.written() == {"unused": 5, "partner": 4}
    two.root_sets = _sets(internal=4, partner=3)
    assert roots.written() == {"unused": 5, "internal": 3}
    volumes.forget("two")
    assert roots.written() == {"unused": 5, "internal": 3, "partner": 4}


def test_before_the_stream_a_volume_that_trusts_more_is_not_passed_over() -> None:
    """An answer for one volume tells of one set; another volume that trusts it too has not got it yet."""
    volumes = VolumeTable()
    roots, one, two = _roots(volumes), _volume("one"), _volume("two", "partner")
    volumes.keep(one)
    volumes.keep(two)
    one.root_sets = roots.accept_response(one.trusted_names, _sets(internal=3))
    assert roots.written() == {}


def test_a_volume_that_nobody_takes_up_is_waited_for_three_minutes() -> None:
    """Its record was no use at the start: the kubelet would have asked for it by then, if its pod lived."""
    roots = _roots(VolumeTable())

    async def story() -> list[dict[str, int]]:
        roots.await_adoption(["lost"])
        roots.apply_bundle(_sets(internal=1))
        held = [dict(roots.written())]
        await asyncio.sleep(179)
        held.append(dict(roots.written()))
        await roots.changed()
        await asyncio.sleep(2)
        await roots.changed()
        held.append(dict(roots.written()))
        return held

    assert run_virtually(story()) == [{}, {}, {"internal": 1}]


def test_a_volume_that_is_taken_up_or_removed_is_waited_for_no_longer() -> None:
    """Adopted or unpublished: then all that is there is known."""
    roots_volumes = VolumeTable()
    roots = _roots(roots_volumes)

    async def story() -> None:
        roots.await_adoption(["adopted", "unpublished"])
        roots.apply_bundle(_sets(internal=1))
        adopted = _volume("adopted")
        adopted.root_sets = _sets(internal=1)
        roots_volumes.keep(adopted)
        roots.check_restored(adopted)
        assert roots.written() == {}
        roots_volumes.forget("unpublished")
        assert roots.written() == {"internal": 1}

    run_virtually(story())


def test_the_roots_of_an_issuer_that_is_gone_stay_with_its_certificates() -> None:
    """Its chain ends there; what else the volume trusts is renewed, and without its own nothing is written."""
    volumes = VolumeTable()
    roots, volume = _roots(volumes), _volume("one", "partner")
    roots.apply_bundle(_sets(internal=1, partner=1))
    volume.root_sets = _sets(internal=1, partner=1)
    volumes.keep(volume)
    roots.apply_bundle(_sets(partner=2))
    assert roots._wanted(volume) == _sets(internal=1, partner=2)
    volume.root_sets = {}
    assert roots._wanted(volume) == {}
    assert not roots._behind(volume)


def test_a_certificate_brings_the_roots_that_the_stream_does_not_know() -> None:
    """Of its own issuer: another replica may stream than the one that answered."""
    roots = _roots(VolumeTable())
    roots.apply_bundle(_sets(internal=1))
    roots.apply_bundle(_sets(internal=2, partner=3))
    roots.apply_bundle(_sets(partner=3))
    assert roots.accept_response(("internal", "partner"), _sets(internal=2, partner=3)) == _sets(internal=2, partner=3)
