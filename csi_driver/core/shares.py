"""Fair shares of a limited resource. Every resource that tenants share is limited this way; SECURITY.md lists them.

The rule is that of dynamic thresholds (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998): an owner may
hold as much as is still free. A single owner gets half of the capacity, two owners a third each, and an owner that holds
nothing always finds room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager

from csi_driver.core.errors import CertmountError, Fault, Reason

_ALL = "certmount"
_SMALL = 8


class FairShares:
    """Divides ``capacity`` of a resource, for instance "orders in progress", between owners. Belongs to one thread or event loop.

    A request can have several owners, such as a namespace and a service account in it. It is admitted if the total and what
    each of its owners holds then fit into the capacity together. So a service account that is alone in its namespace gets a
    third of the capacity.

    ``full`` is the reason of a refusal if many owners together use the capacity, and the refused one holds less than an
    eighth of what they hold. By default, such a refusal is like any other. ``hint`` says what a refused owner can do.
    """

    def __init__(
        self, resource: str, capacity: int, full: Reason | None = None, hint: str = "wait until some of them end"
    ) -> None:
        self.resource = resource
        self.capacity = capacity
        self.full = full
        self.hint = hint
        self.total = 0  # what all owners hold together
        self._held: Counter[str] = Counter()

    def held(self, owner: str) -> int:
        return self._held[owner]

    def take(self, owners: Sequence[str], amount: int = 1) -> None:
        """Take an amount for its owners, the largest owner first; raises CertmountError ShareExceeded, and takes nothing then."""
        if (owner := self._exceeding(owners, amount)) is not None:
            raise self._exceeded(owner, self.total if owner == _ALL else self._held[owner], amount)
        self.count(owners, amount)

    def try_take(self, owners: Sequence[str]) -> bool:
        """Take one if it fits; return whether it does."""
        if fits := self.fits(owners):
            self.count(owners)
        return fits

    def fits(self, owners: Sequence[str], amount: int = 1) -> bool:
        """Return True if :meth:`take` would succeed."""
        return self._exceeding(owners, amount) is None

    def count(self, owners: Sequence[str], amount: int = 1) -> None:
        """Take an amount that exists already, even if it exceeds the capacity."""
        self.total += amount
        for owner in owners:
            self._held[owner] += amount

    def give_back(self, owners: Sequence[str], amount: int = 1) -> None:
        self.total -= amount
        for owner in owners:
            self._held[owner] -= amount
            if not self._held[owner]:
                del self._held[owner]

    def hold(self, owners: Sequence[str], amount: int = 1) -> AbstractContextManager[None]:
        """Hold an amount while the block runs; entering it raises CertmountError as :meth:`take`."""
        return _Hold(self, owners, amount)

    def _exceeding(self, owners: Sequence[str], amount: int) -> str | None:
        free = self.capacity - self.total - amount
        if free < 0:
            return _ALL
        for owner in owners:
            free -= self._held[owner] + amount
            if free < 0:
                return owner
        return None

    def _exceeded(self, owner: str, held: int, amount: int) -> CertmountError:
        reason = Reason.SHARE_EXCEEDED
        if self.full is not None and held * _SMALL < self.total:
            owner, held, reason = _ALL, self.total, self.full
        problem = f"holds {held} of {self.capacity} {self.resource} and requests {amount} more, which exceeds its share"
        return CertmountError(reason, Fault(owner, problem, self.hint))


class _Hold(AbstractContextManager[None]):
    """A class, because it is faster than a generator and runs several times for each certificate."""

    __slots__ = ("_amount", "_owners", "_shares")

    def __init__(self, shares: FairShares, owners: Sequence[str], amount: int) -> None:
        self._shares, self._owners, self._amount = shares, owners, amount

    def __enter__(self) -> None:
        self._shares.take(self._owners, self._amount)

    def __exit__(self, *_error: object) -> None:
        self._shares.give_back(self._owners, self._amount)
