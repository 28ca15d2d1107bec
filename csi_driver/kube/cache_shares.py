"""Divide the memory of a cache between the owners of its objects."""

from __future__ import annotations

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.shares import FairShares
from csi_driver.kube.metadata import MAX_PAIRS, Pairs

_MAX_TEXTS = 10
PAIR_BYTES = 300
"""What a label costs in memory in addition to its characters: two strings, a tuple, and their places in other objects."""


class CacheShares:
    """Objects that exceed their owner's share are not stored; ``refusal`` has the words for the owner."""

    def __init__(self, resource: str, capacity: int, shares: FairShares | None = None) -> None:
        """``shares`` is the capacity that several caches use together."""
        self._shares = shares or FairShares(resource, capacity)
        self._refusals: dict[str, CertmountError] = {}
        self.has_room = False  # True if an object was removed after another was refused

    @property
    def refusing(self) -> bool:
        return bool(self._refusals)

    def refusal(self, owner: str) -> CertmountError | None:
        """Return the error for the last object of the owner that was refused since the last list."""
        return self._refusals.get(owner)

    def texts(self) -> list[str]:
        """Return the errors of some owners."""
        return [str(error) for error in list(self._refusals.values())[:_MAX_TEXTS]]

    def take(self, owner: str, size: int) -> bool:
        """Return whether an object of this many bytes can be stored."""
        try:
            self._shares.take((owner,), size)
        except CertmountError as error:
            self._refusals[owner] = error
            return False
        return True

    def give_back(self, owner: str, size: int) -> None:
        self._shares.give_back((owner,), size)
        self.make_room()

    def replace(self, owner: str, before: int, after: int) -> bool:
        """Return whether an object that took ``before`` bytes can take ``after``; if it cannot, it takes none.

        An object that stays as large makes no room: otherwise each list would lead to another one.
        """
        self._shares.give_back((owner,), before)
        taken = self.take(owner, after)
        if before and (after < before or not taken):
            self.make_room()
        return taken

    def make_room(self) -> None:
        """Record that an object was removed."""
        self.has_room = self.refusing

    def record(self, owner: str, error: CertmountError) -> None:
        """Record that the cache refused an object of the owner because of another limit."""
        self._refusals[owner] = error

    def refuse(self, owner: str, name: str, what: str) -> None:
        """Refuse an object because it has too many labels or pairs of a selector."""
        problem = f"has more than {MAX_PAIRS} {what}, so certmount ignores it"
        self.record(owner, CertmountError(Reason.SHARE_EXCEEDED, Fault(name, problem, f"use at most {MAX_PAIRS}")))

    def start_list(self) -> None:
        """Forget the refusals, because a list reports all objects again."""
        self._refusals.clear()
        self.has_room = False


def pairs_bytes(pairs: Pairs) -> int:
    """Return about how much memory the pairs take."""
    return sum(PAIR_BYTES + len(name) + len(value) for name, value in pairs)


def namespace_owner(namespace: str) -> str:
    return f"namespace {namespace}"
