"""Removal of challenge responses: one that fails does not keep others published, and does not last forever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.authority.issuers.acme.config import AccountStorage, AcmeConfiguration, Dns01
from csi_driver.authority.issuers.acme.context import OrderStore
from csi_driver.authority.issuers.acme.dns01 import Dns01Solver
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.acme.order_rules import (
    after_problem,
    claim_orders,
    remove_expired,
    unremovable_orders,
)
from csi_driver.authority.issuers.acme.state import AcmeState, ChallengeRecord
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.storage import DirectoryStore
from tests.peers.acme import running_issuers
from tests.support.waiting import until
from tests.unit.authority.clock import Clock
from tests.unit.authority.issuers.acme.samples import CHALLENGE, NOW, order

MOVED = replace(CHALLENGE, name="old.test", record_name="_acme-challenge.old.test.", zone="old.test.")
LATER = replace(MOVED, name="www.old.test", record_name="_acme-challenge.www.old.test.")
DAY = 86400.0


class Solver(Dns01Solver):
    """Removes challenges, but not those in the zone that another server has now."""

    def __init__(self) -> None:
        super().__init__(Dns01("127.0.0.1"), CredentialReader())
        self.removed: list[ChallengeRecord] = []
        self.attempts = 0

    async def unpublish(self, challenge: ChallengeRecord) -> None:
        self.attempts += 1
        if challenge.zone == MOVED.zone:
            raise issuer_unavailable("DNS server", f"returned NOTAUTH to an update of zone {challenge.zone}")
        self.removed.append(challenge)


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def solver() -> Solver:
    return Solver()


@pytest.fixture
def issuer(tmp_path: Path, clock: Clock, solver: Solver) -> AcmeIssuer:
    configuration = AcmeConfiguration(
        AccountStorage(directory=str(tmp_path)), "https://localhost:1/", dns01=Dns01("127.0.0.1")
    )
    issuer = AcmeIssuer("ca", configuration, DirectoryStore(tmp_path, "acme.json"), clock=clock, lease_s=0.2)
    issuer._context = replace(issuer._context, solver=solver)
    return issuer


async def test_records_in_other_zones_are_removed_although_one_zone_has_moved(
    issuer: AcmeIssuer, clock: Clock, solver: Solver
) -> None:
    """The moved zone is tried once for each attempt, because its server may not answer at all."""
    orders = OrderStore(issuer.store, clock)
    abandoned = order(abandoned=True, challenges=(MOVED, LATER, CHALLENGE))
    await orders.change(lambda _: AcmeState((abandoned,)))
    async with running_issuers(issuer):
        await until(lambda: solver.attempts, "the first attempt")
        await until(lambda: issuer._orders.known.orders[0].failures, "its result")
    assert (solver.removed, solver.attempts) == ([CHALLENGE], 2)
    (remaining,) = (await orders.read(0.0)).orders
    assert remaining.challenges == (MOVED, LATER)
    assert "NOTAUTH to an update of zone old.test." in remaining.problem


async def test_records_that_may_remain_are_in_the_log_once(issuer: AcmeIssuer, clock: Clock) -> None:
    """Two replicas run, and one of them writes the line."""
    other = AcmeIssuer("ca", issuer.configuration, issuer.store, clock=clock, lease_s=0.2)
    stuck = order(abandoned=True, challenges=(MOVED,), failures=50, problem="returned NOTAUTH", retry_at=NOW + 4 * DAY)
    await OrderStore(issuer.store, clock).change(lambda _: AcmeState((stuck,)))
    with capture_logs() as logs:
        async with running_issuers(issuer, other):
            clock.forward(3 * DAY + 1)
            await until(lambda: [one for one in logs if "records" in one], "the warning")
            await until(lambda: not (issuer._orders.known.orders or other._orders.known.orders), "both replicas")
    (warning,) = [one for one in logs if "records" in one]
    assert (warning["log_level"], warning["issuer"], warning["error"]) == ("warning", "ca", "returned NOTAUTH")
    assert warning["records"] == ["_acme-challenge.old.test. TXT value"]


def _after_failed_removals(state: AcmeState, start: float, count: int, interval_s: float) -> AcmeState:
    """Return the state after a replica tried this often to remove what the orders published."""
    for number in range(count):
        now = start + number * interval_s
        state = claim_orders(remove_expired(state, now), "me", now, 60)
        for one in state.orders:
            if one.holder == "me":
                state = after_problem(state, one, AcmeProblem("", "returned NOTAUTH"), now)
    return state


@pytest.mark.parametrize("changes", [{"url": "https://ca/1", "failures": 20}, {"finished_at": NOW}])
def test_removal_of_challenges_is_given_up_after_three_days(changes: dict[str, Any]) -> None:
    """The zone has moved, for instance, or the Secret with its TSIG key is no longer listed."""
    state = AcmeState((order(challenges=(CHALLENGE,), **changes),))
    state = _after_failed_removals(state, NOW + 3 * 3600, 69, 3600)
    assert unremovable_orders(state, NOW + 3 * DAY - 1) == ()
    assert [one.challenges for one in remove_expired(state, NOW + 3 * DAY - 1).orders] == [(CHALLENGE,)]
    later = NOW + 3 * DAY + 1
    assert [one.challenges for one in unremovable_orders(state, later)] == [(CHALLENGE,)]
    assert remove_expired(state, later) == AcmeState()


def test_removal_of_challenges_is_tried_after_a_long_outage() -> None:
    """No replica ran for days, and when the first one starts, the DNS server may start, too."""
    abandoned = order(challenges=(CHALLENGE,), failures=20)
    finished = order(id="finished", finished_at=NOW, challenges=(CHALLENGE,))
    state, restart = AcmeState((abandoned, finished)), NOW + 10 * DAY
    assert len(claim_orders(remove_expired(state, restart), "me", restart, 60).orders) == 2
    state = _after_failed_removals(state, restart, 9, 300)
    assert len(remove_expired(state, restart + 2700).orders) == 2
    state = _after_failed_removals(state, restart + 2700, 1, 300)
    assert remove_expired(state, restart + 3000) == AcmeState()


def test_order_in_progress_is_never_given_up() -> None:
    removing = order(abandoned=True, failures=20, challenges=(CHALLENGE,), holder="me", lease_until=NOW + 5 * DAY)
    requested = order(
        id="open", failures=1000, challenges=(CHALLENGE,), created_at=NOW - DAY, requested_at=NOW + 4 * DAY
    )
    state = AcmeState((removing, requested))
    assert unremovable_orders(state, NOW + 4 * DAY) == ()
    assert remove_expired(state, NOW + 4 * DAY) == state
