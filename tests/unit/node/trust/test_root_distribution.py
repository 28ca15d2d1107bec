"""Which root sets are known and all volumes contain, and how long the driver waits for a quarantined volume."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import cast

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from csi_driver.core.attributes import CertificateSpec, parse_attributes
from csi_driver.core.certificates.root_sets import RootSet, trusted_root_set_names
from csi_driver.core.names import Names
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.trust.known_root_sets import KnownRootSets
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.budget import MEMORY_LIMIT, VolumeBudget
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
    budget = VolumeBudget(store, MEMORY_LIMIT)
    remover = VolumeRemover(store, volumes, budget, lambda: 0.0, lambda: 0.5)
    metrics = NodeMetrics(CollectorRegistry())
    return RootDistribution(store, volumes, remover, budget, metrics, lambda: 0.0, lambda: 0.5)


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
    assert roots.written({"unused": 5, "internal": 2}) == {"internal": 3, "partner": 4}
    assert roots.written({"unused": 5, "internal": 3, "partner": 4}) == {}


def test_volume_with_only_roots_delays_the_acknowledgement() -> None:
    """The pod would reject certificates of the next CA."""
    volumes = VolumeTable()
    roots, volume = _distribution(volumes), _volume(volumes, "one")
    volume.spec = parse_attributes({"root-only": "true", "federations": "partner"})
    roots.apply_bundle(_sets(internal=3, partner=4), ["internal"])
    volume.root_sets = _sets(internal=2, partner=4)
    assert roots.written() == {"partner": 4}
    volume.root_sets = roots.select("internal", ("partner",))
    assert roots.written() == {"internal": 3, "partner": 4}


def test_response_before_the_first_bundle_does_not_mark_other_volumes_as_written() -> None:
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


_NAMES = ("internal", "partner", "other")


def _set(generation: int) -> RootSet:
    return RootSet((f"root {generation}".encode(),), generation)


@dataclass(frozen=True)
class _Message:
    """A trust bundle, or the sets of an issuance response."""

    is_bundle: bool
    sets: dict[str, RootSet]


_any_sets = st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 9).map(_set))
_messages = st.lists(st.builds(_Message, st.booleans(), _any_sets), max_size=12)


def _receive(known: KnownRootSets, messages: list[_Message]) -> None:
    for message in messages:
        (known.apply_bundle if message.is_bundle else known.add_response)(message.sets)


@given(_messages)
def test_generation_of_a_set_never_decreases(messages: list[_Message]) -> None:
    known = KnownRootSets()
    for message in messages:
        before = dict(known.sets)
        _receive(known, [message])
        for name, roots in before.items():
            if name in known.sets:
                assert known.sets[name].generation >= roots.generation
            else:
                assert message.is_bundle
                assert name not in message.sets
        for name in known.sets:
            assert known.sets[name] in (before.get(name), message.sets.get(name))


@given(_messages, _any_sets)
def test_all_sets_of_a_bundle_are_known(messages: list[_Message], listed: dict[str, RootSet]) -> None:
    known = KnownRootSets()
    _receive(known, [*messages, _Message(True, listed)])
    assert all(known.sets[name].generation >= roots.generation for name, roots in listed.items())


@given(_messages, _any_sets, _any_sets)
def test_removed_set_comes_back_only_with_a_newer_generation(
    messages: list[_Message], listed: dict[str, RootSet], later: dict[str, RootSet]
) -> None:
    """A set is removed if one bundle lists it and the next one does not."""
    known = KnownRootSets()
    _receive(known, [*messages, _Message(True, listed)])
    before = dict(known.sets)
    known.apply_bundle({})
    assert not known.sets.keys() & listed.keys()
    known.add_response(later)
    for name in listed.keys() & later.keys():
        assert (name in known.sets) == (later[name].generation > before[name].generation)


def test_set_of_a_response_survives_one_bundle_without_it() -> None:
    """Another replica may know the set before the replica that streams. A second bundle without it removes it."""
    known = KnownRootSets()
    known.apply_bundle({"internal": _set(1)})
    known.add_response({"internal": _set(1), "partner": _set(5)})
    known.apply_bundle({"internal": _set(2)})
    assert known.select(("internal", "partner")) == {"internal": _set(2), "partner": _set(5)}
    known.apply_bundle({"internal": _set(2)})
    assert known.select(("internal", "partner")) == {"internal": _set(2)}


def test_select_returns_nothing_while_a_set_may_be_missing() -> None:
    """Before the first bundle, the response for one volume does not list the sets of another one."""
    known = KnownRootSets()
    assert known.select(("internal",)) == {}
    known.add_response({"internal": _set(1)})
    assert known.select(("internal",)) == {"internal": _set(1)}
    assert known.select(("internal", "partner")) == {}
    known.apply_bundle({"internal": _set(1)})
    assert known.select(("internal", "partner")) == {"internal": _set(1)}
    assert known.select(("partner",)) == {}


def test_trusted_sets_are_the_issuers_first_and_the_internal_cas_last() -> None:
    spec = CertificateSpec(Names(), issuer="acme", federations=("partner", "acme", "other"))
    assert trusted_root_set_names(spec) == ("acme", "partner", "other")
    assert trusted_root_set_names(spec, interim=True) == ("acme", "partner", "other", "internal")
    spec = CertificateSpec(Names(), issuer="acme", federations=("internal",))
    assert trusted_root_set_names(spec, interim=True) == ("acme", "internal")
