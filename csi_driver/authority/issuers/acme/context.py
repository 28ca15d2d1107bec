"""What the parts of an ACME issuer share."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import ParamSpec, Protocol, TypeVar

from csi_driver.authority.issuers.acme.account import AcmeAccounts
from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.authority.issuers.acme.order_store import OrderStore
from csi_driver.authority.issuers.acme.state import ChallengeRecord, OrderRecord
from csi_driver.authority.issuers.dependencies import CredentialReader

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ChallengeSolver(Protocol):
    """Proves control of names to the CA. Methods raise CertmountError."""

    @property
    def kind(self) -> str:
        """The challenge type, such as ``dns-01``."""

    async def check(self, names: Sequence[str]) -> None:
        """Check, without changing anything, whether the solver supports the names."""

    async def prepare(self, name: str, token: str, key_authorization: str) -> ChallengeRecord:
        """Return what to publish; change nothing."""

    async def publish(self, challenges: Sequence[ChallengeRecord]) -> None:
        """Publish the responses, and wait until the CA can see them."""

    async def unpublish(self, challenge: ChallengeRecord) -> None:
        """Remove a response, if it exists."""


@dataclass(frozen=True, slots=True)
class AcmeContext:
    """The configuration and the services of one issuer."""

    configuration: AcmeConfiguration
    credentials: CredentialReader
    orders: OrderStore
    accounts: AcmeAccounts
    solver: ChallengeSolver
    executor: Executor
    clock: Callable[[], float]
    holder: str  # The identity of this replica in leases

    async def in_thread(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, functools.partial(function, *args, **kwargs))

    async def unpublish_challenges(self, order: OrderRecord) -> None:
        """Unpublish and remove all challenges of an order; raise CertmountError at the first failure."""
        for challenge in order.challenges:
            # A CA can give two orders the same authorization, and so the same response.
            others = (one for one in self.orders.known.orders if one.id != order.id and one.is_open)
            if not any(challenge in one.challenges for one in others):
                await self.solver.unpublish(challenge)
            await self.orders.change_order(order.id, self.holder, functools.partial(_without, challenge))


def _without(challenge: ChallengeRecord, order: OrderRecord) -> OrderRecord:
    return replace(order, challenges=tuple(one for one in order.challenges if one != challenge))
