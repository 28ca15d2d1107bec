"""What the node knows of the authority's sets of roots: the newest state of each, from its stream and its answers alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csi_driver.core.certificates.root_sets import RootSet, newest_root_sets


class KnownRootSets:
    """The newest state of each set by its generation, whatever the order in which replicas told it.

    An answer only adds and renews. What the stream no longer lists is dropped, and comes back with the stream or by an
    answer with a newer state, not by the answer of a replica that has not heard of the end yet.
    """

    def __init__(self) -> None:
        self._sets: Mapping[str, RootSet] = {}
        self._dropped: dict[str, int] = {}
        # Sets that an answer brought and no bundle of the stream listed yet: a bundle is no word about those, once.
        self._ahead: set[str] = set()
        self._complete = False

    @property
    def sets(self) -> Mapping[str, RootSet]:
        """All that is known now."""
        return self._sets

    def answered(self, sets: Mapping[str, RootSet]) -> None:
        """Takes what came with a certificate."""
        news = {name: roots for name, roots in sets.items() if roots.generation > self._dropped.get(name, -1)}
        self._ahead |= news.keys() - self._sets.keys()
        self._sets = newest_root_sets(self._sets, news)

    def streamed(self, sets: Mapping[str, RootSet]) -> None:
        """Takes a bundle of the stream, which lists all sets that there are."""
        kept = {name: roots for name, roots in self._sets.items() if name in sets or name in self._ahead}
        self._dropped.update({name: roots.generation for name, roots in self._sets.items() if name not in kept})
        for name in sets:
            self._dropped.pop(name, None)
        self._ahead = set()
        self._sets = newest_root_sets(kept, sets)
        self._complete = True

    def of(self, names: Sequence[str]) -> dict[str, RootSet]:
        """The sets of these different names that there are; none where that can't be said yet.

        Before the first bundle of the stream a set that is not known may well be there.
        """
        found = {name: self._sets[name] for name in names if name in self._sets}
        return found if self._complete or len(found) == len(names) else {}
