"""Who takes a certificate that is held, who asks for all, and what ends the sharing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.spec import CertificateSpec
from csi_driver.node.issuance.enrolled import Enrolled, Wanted
from csi_driver.node.issuance.shared import Shared
from tests.unit.node.certificates import POD, SETS, SPEC, WANTED, enrolled
from tests.unit.node.virtual_time import run_virtually

KNOWN = {**SETS, "partner": RootSet((b"partner",), 1), "internal": RootSet((b"internal",), 1)}


class World:
    """Volumes before an authority that answers a second later with what it is told to."""

    def __init__(self, most: int = 10) -> None:
        self.shared = Shared(self, lambda: KNOWN, self.now, most)
        self.answer: Enrolled | Exception = enrolled()
        self.live: Enrolled | None = None
        self.asked = 0
        self.looked = 0

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()

    async def find(self, _wanted: Wanted) -> Enrolled | None:
        self.looked += 1
        return self.live

    async def ask(self) -> Enrolled:
        self.asked += 1
        await asyncio.sleep(1)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def obtain(
        self, spec: CertificateSpec = SPEC, wanted: Wanted = WANTED, *, first: bool = True
    ) -> Awaitable[Enrolled]:
        return self.shared.obtain(wanted, spec, self.ask, first=first)

    async def fails(self, **options: bool) -> Reason:
        with pytest.raises(CertmountError) as failure:
            await self.obtain(**options)  # type: ignore[arg-type]  # first only
        return failure.value.reason


def _told(story: Callable[[World], Awaitable[None]], most: int = 10) -> World:
    async def run() -> World:
        world = World(most)
        await story(world)
        return world

    return run_virtually(run())


def test_one_asks_for_all() -> None:
    """Those who come while it is asked take the answer, those who come later what is held."""

    async def story(world: World) -> None:
        many = await asyncio.gather(*(world.obtain() for _ in range(20)))
        assert len({id(one.bundle) for one in many}) == 1
        await world.obtain()
        assert world.asked == 1

    _told(story)


def test_until_its_moment_it_is_given_to_all_and_past_it_to_those_who_have_nothing() -> None:
    """A pod that starts when the renewal is due starts at once, and renews then; past half of the rest it waits for a new one."""

    async def story(world: World) -> None:
        await world.obtain()
        await asyncio.sleep(50)
        await world.obtain(first=False)
        assert world.asked == 1
        await asyncio.sleep(15)
        world.answer = enrolled(66, 1000, 2000)
        assert (await world.obtain(first=True)).renew_at == 60
        assert (await world.obtain(first=False)).renew_at == 1000
        assert world.asked == 2

    async def late(world: World) -> None:
        await world.obtain()
        await asyncio.sleep(81)
        await world.obtain(first=True)
        assert world.asked == 2

    _told(story)
    _told(late)


def test_who_wants_to_renew_earlier_does_so_for_all() -> None:
    """One volume's renew-before brings its own moment forward; what it gets then is what the others take."""
    early = replace(SPEC, renew_before=timedelta(seconds=70))

    async def story(world: World) -> None:
        await world.obtain()
        assert (await world.obtain(early)).renew_at == 30
        await asyncio.sleep(35)
        world.answer = enrolled(36, 1000, 2000)
        assert (await world.obtain(early, first=False)).renew_at == 1000
        assert (await world.obtain(first=False)).renew_at == 1000
        assert world.asked == 2

    _told(story)


def test_each_volume_gets_the_roots_that_it_asks_for() -> None:
    """A federation of one is none of another's; one that there is not is refused without a question."""
    federated = replace(SPEC, federations=("partner",))
    unknown = replace(SPEC, federations=("nobody",))

    async def story(world: World) -> None:
        assert set((await world.obtain()).trust) == {"acme"}
        assert set((await world.obtain(federated)).trust) == {"acme", "partner"}
        with pytest.raises(CertmountError, match="no roots by the name nobody") as failure:
            await world.obtain(unknown)
        assert failure.value.reason is Reason.FEDERATION_NOT_FOUND
        assert world.asked == 1

    _told(story)


def test_a_stand_in_brings_the_internal_roots() -> None:
    """For as long as it stands in."""

    async def story(world: World) -> None:
        world.answer = enrolled(0, 15, 100, interim=True)
        assert set((await world.obtain()).trust) == {"acme", "internal"}
        await asyncio.sleep(20)
        world.answer = enrolled(20, 60, 100)
        assert set((await world.obtain(first=False)).trust) == {"acme"}

    _told(story)


def test_a_failure_of_the_order_is_everybodys() -> None:
    """Those who wait hear it, and none of them asks by itself."""

    async def story(world: World) -> None:
        world.answer = CertmountError(Reason.ISSUANCE_PENDING, "the CA is at it")
        reasons = await asyncio.gather(*(world.fails() for _ in range(5)))
        assert set(reasons) == {Reason.ISSUANCE_PENDING}
        assert world.asked == 1

    _told(story)


@pytest.mark.parametrize(
    "reason", [Reason.TOKEN_EXPIRED, Reason.POD_NOT_FOUND, Reason.TOKEN_REJECTED, Reason.NAME_NOT_ALLOWED]
)
def test_a_failure_of_the_pod_is_its_own(reason: Reason) -> None:
    """The next one asks: its token may be good where another's was not."""

    async def story(world: World) -> None:
        world.answer = CertmountError(reason, "no")
        await asyncio.gather(*(world.fails() for _ in range(3)))
        assert world.asked == 3

    _told(story)


def test_who_is_cancelled_leaves_the_question_to_the_next() -> None:
    """And a defect in one question is no answer for others either."""

    async def story(world: World) -> None:
        first = asyncio.ensure_future(world.obtain())
        await asyncio.sleep(0.5)
        second = asyncio.ensure_future(world.obtain())
        third = asyncio.ensure_future(world.obtain())
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        assert (await third).renew_at == 60
        assert world.asked == 2
        world.answer = ValueError("a defect")
        other = Wanted.of(POD, SPEC, "x")
        await asyncio.gather(world.obtain(wanted=other), world.obtain(wanted=other), return_exceptions=True)
        assert world.asked == 4

    _told(story)


@pytest.mark.parametrize("reason", [Reason.SERVICE_ACCOUNT_DENIED, Reason.NAME_NOT_ALLOWED])
def test_what_is_refused_at_the_renewal_is_given_to_nobody_any_more(reason: Reason) -> None:
    """Not out of memory, nor out of a volume that still shows it."""

    async def story(world: World) -> None:
        world.live = await world.obtain()
        await asyncio.sleep(65)
        world.answer = CertmountError(reason, "denied")
        assert await world.fails(first=False) is reason
        assert await world.fails(first=True) is reason
        assert world.asked == 3

    _told(story)


def test_a_limit_that_is_reached_takes_nothing_away() -> None:
    """The renewal fails, and a pod that starts still gets what is good."""

    async def story(world: World) -> None:
        await world.obtain()
        await asyncio.sleep(65)
        world.answer = CertmountError(Reason.TOO_MANY_REQUESTS, "five a week")
        assert await world.fails(first=False) is Reason.TOO_MANY_REQUESTS
        assert (await world.obtain(first=True)).renew_at == 60

    _told(story)


def test_a_driver_that_starts_anew_looks_into_the_volumes_once() -> None:
    """What lies there is as good as what was in memory."""

    async def story(world: World) -> None:
        world.live = enrolled()
        await asyncio.gather(*(world.obtain() for _ in range(3)))
        await world.obtain()
        assert (world.asked, world.looked) == (0, 1)

    _told(story)


def test_the_longest_unused_is_forgotten() -> None:
    """Memory has an end; what has expired goes first."""
    others = [Wanted.of(replace(POD, service_account=f"sa-{number}"), SPEC) for number in range(4)]

    async def story(world: World) -> None:
        for other in others[:2]:
            await world.obtain(wanted=other)
        await world.obtain(wanted=others[0])
        await world.obtain(wanted=others[2])
        assert world.asked == 3
        await world.obtain(wanted=others[0])
        assert world.asked == 3
        await world.obtain(wanted=others[1])
        assert world.asked == 4
        await asyncio.sleep(200)
        world.answer = enrolled(200, 300, 400)
        await world.obtain(wanted=others[3])
        assert len(world.shared._held) == 1
        await asyncio.sleep(300)
        world.shared.streamed({"acme"})
        assert not world.shared._held

    _told(story, most=2)


def test_whether_certificates_are_shared_is_the_authoritys_word() -> None:
    """It is waited for, but not for ever; the internal CA's never are."""

    async def story(world: World) -> None:
        assert not await world.shared.has("internal")
        with pytest.raises(CertmountError, match="has not said yet") as failure:
            await world.shared.has("acme")
        assert failure.value.retryable
        asyncio.get_running_loop().call_later(5, world.shared.streamed, {"acme"})
        assert await world.shared.has("acme")
        assert not await world.shared.has("other")
        world.shared.streamed(frozenset())
        assert not await world.shared.has("acme")

    _told(story)
