"""The newest version of each root set, from the trust stream and from issuance responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csi_driver.core.certificates.root_sets import RootSet, newest_root_sets


class KnownRootSets:
    """The version with the highest generation of each root set, in whatever order the replicas send them.

    Only a trust bundle removes a set. An issuance response adds a removed set again only with a newer generation: a
    replica may not know yet that the set was removed.
    """

    def __init__(self) -> None:
        self._sets: Mapping[str, RootSet] = {}
        self._removed: dict[str, int] = {}
        # Sets from responses that no bundle has listed yet. The next bundle does not remove them: it can be older.
        self._ahead: set[str] = set()
        self._complete = False

    @property
    def sets(self) -> Mapping[str, RootSet]:
        return self._sets

    def add_response(self, sets: Mapping[str, RootSet]) -> None:
        new = {name: roots for name, roots in sets.items() if roots.generation > self._removed.get(name, -1)}
        self._ahead |= new.keys() - self._sets.keys()
        self._sets = newest_root_sets(self._sets, new)

    def apply_bundle(self, sets: Mapping[str, RootSet]) -> None:
        """Apply a bundle of the trust stream, which lists all sets."""
        kept = {name: roots for name, roots in self._sets.items() if name in sets or name in self._ahead}
        self._removed.update({name: roots.generation for name, roots in self._sets.items() if name not in kept})
        for name in sets:
            self._removed.pop(name, None)
        self._ahead = set()
        self._sets = newest_root_sets(kept, sets)
        self._complete = True

    def select(self, names: Sequence[str]) -> dict[str, RootSet]:
        """Return the named sets that exist.

        Before the first bundle an unknown set may exist. In that case return none.
        """
        found = {name: self._sets[name] for name in names if name in self._sets}
        return found if self._complete or len(found) == len(names) else {}
