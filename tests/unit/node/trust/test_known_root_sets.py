"""The known root sets, in whatever order the replicas send them."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.root_sets import RootSet, trusted_root_set_names
from csi_driver.core.names import Names
from csi_driver.node.trust.known_root_sets import KnownRootSets

_NAMES = ("internal", "partner", "other")


def _set(generation: int) -> RootSet:
    return RootSet((f"root {generation}".encode(),), generation)


@dataclass(frozen=True)
class _Message:
    """A trust bundle, or the sets of an issuance response."""

    is_bundle: bool
    sets: dict[str, RootSet]


_sets = st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 9).map(_set))
_messages = st.lists(st.builds(_Message, st.booleans(), _sets), max_size=12)


def _receive(known: KnownRootSets, messages: list[_Message]) -> None:
    for message in messages:
        (known.apply_bundle if message.is_bundle else known.add_response)(message.sets)


@given(_messages)
def test_generation_of_a_set_never_decreases(messages: list[_Message]) -> None:
    """Only a bundle removes a set."""
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


@given(_messages, _sets)
def test_all_sets_of_a_bundle_are_known(messages: list[_Message], listed: dict[str, RootSet]) -> None:
    """In that generation or a newer one, whatever was received or removed before."""
    known = KnownRootSets()
    _receive(known, [*messages, _Message(True, listed)])
    assert all(known.sets[name].generation >= roots.generation for name, roots in listed.items())


@given(_messages, _sets, _sets)
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
    """Without duplicates. The internal CA's set is added for an interim certificate."""
    spec = CertificateSpec(Names(), issuer="acme", federations=("partner", "acme", "other"))
    assert trusted_root_set_names(spec) == ("acme", "partner", "other")
    assert trusted_root_set_names(spec, interim=True) == ("acme", "partner", "other", "internal")
    spec = CertificateSpec(Names(), issuer="acme", federations=("internal",))
    assert trusted_root_set_names(spec, interim=True) == ("acme", "internal")
