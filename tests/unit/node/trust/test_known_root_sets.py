"""What the node knows of the sets of roots, whatever the order in which replicas that differ tell it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.certificates.root_sets import RootSet, trusted_root_set_names
from csi_driver.core.names import Names
from csi_driver.core.spec import CertificateSpec
from csi_driver.node.trust.known_root_sets import KnownRootSets

_NAMES = ("internal", "partner", "other")


def _set(generation: int) -> RootSet:
    return RootSet((f"root {generation}".encode(),), generation)


@dataclass(frozen=True)
class _Answer:
    sets: dict[str, RootSet]


@dataclass(frozen=True)
class _Bundle:
    sets: dict[str, RootSet]


_sets = st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 9).map(_set))
_told = st.lists(st.one_of(st.builds(_Answer, _sets), st.builds(_Bundle, _sets)), max_size=12)


def _tell(known: KnownRootSets, told: _Answer | _Bundle) -> None:
    (known.answered if isinstance(told, _Answer) else known.streamed)(told.sets)


@given(_told)
def test_a_set_never_goes_back(story: list[_Answer | _Bundle]) -> None:
    """A known set gets newer or is dropped by the stream; an answer takes none away and is never older than what is known."""
    known = KnownRootSets()
    for told in story:
        before = dict(known.sets)
        _tell(known, told)
        for name, roots in before.items():
            if name in known.sets:
                assert known.sets[name].generation >= roots.generation
            else:
                assert isinstance(told, _Bundle)
                assert name not in told.sets
        for name in known.sets:
            assert known.sets[name] in (before.get(name), told.sets.get(name))


@given(_told, _sets)
def test_what_the_stream_lists_is_known(story: list[_Answer | _Bundle], listed: dict[str, RootSet]) -> None:
    """After a bundle each set in it is known in that state or a newer one, whatever was told or dropped before."""
    known = KnownRootSets()
    for told in (*story, _Bundle(listed)):
        _tell(known, told)
    assert all(known.sets[name].generation >= roots.generation for name, roots in listed.items())


@given(_told, _sets, _sets)
def test_what_the_stream_drops_stays_away(
    story: list[_Answer | _Bundle], listed: dict[str, RootSet], later: dict[str, RootSet]
) -> None:
    """A set that one bundle lists and the next does not is gone, and an answer brings it back in a newer state only."""
    known = KnownRootSets()
    for told in (*story, _Bundle(listed)):
        _tell(known, told)
    before = dict(known.sets)
    known.apply_bundle({})
    assert not known.sets.keys() & listed.keys()
    known.add_response(later)
    for name in listed.keys() & later.keys():
        assert (name in known.sets) == (later[name].generation > before[name].generation)


def test_an_answer_may_be_ahead_of_the_stream() -> None:
    """A set that only another replica has heard of survives one bundle without it, not two."""
    known = KnownRootSets()
    known.apply_bundle({"internal": _set(1)})
    known.add_response({"internal": _set(1), "partner": _set(5)})
    known.apply_bundle({"internal": _set(2)})
    assert known.select(("internal", "partner")) == {"internal": _set(2), "partner": _set(5)}
    known.apply_bundle({"internal": _set(2)})
    assert known.select(("internal", "partner")) == {"internal": _set(2)}


def test_nothing_is_said_too_early() -> None:
    """After a start, an answer for one volume tells nothing of a volume that trusts more: its files stay as they are."""
    known = KnownRootSets()
    assert known.select(("internal",)) == {}
    known.add_response({"internal": _set(1)})
    assert known.select(("internal",)) == {"internal": _set(1)}
    assert known.select(("internal", "partner")) == {}
    known.apply_bundle({"internal": _set(1)})
    assert known.select(("internal", "partner")) == {"internal": _set(1)}
    assert known.select(("partner",)) == {}


def test_the_issuers_set_comes_first() -> None:
    """Each name once, however often the pod asks for it."""
    spec = CertificateSpec(Names(), issuer="acme", federations=("partner", "acme", "other"))
    assert trusted_root_set_names(spec) == ("acme", "partner", "other")


def test_with_a_stand_in_the_internal_roots_come_too() -> None:
    """Last, and once where the pod asks for them anyway."""
    spec = CertificateSpec(Names(), issuer="acme", federations=("partner",))
    assert trusted_root_set_names(spec, interim=True) == ("acme", "partner", "internal")
    spec = CertificateSpec(Names(), issuer="acme", federations=("internal",))
    assert trusted_root_set_names(spec, interim=True) == ("acme", "internal")
