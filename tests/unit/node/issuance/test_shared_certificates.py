"""When volumes share a certificate, which volume requests it, and what ends the sharing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from datetime import timedelta

import pytest

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.node.issuance.certificate_request import ObtainedCertificate, RequestKey
from csi_driver.node.issuance.shared_certificates import SharedCertificates
from tests.unit.node.certificates import KEY, POD, ROOT_SETS, SPEC, obtained_certificate
from tests.unit.node.virtual_time import in_virtual_time

KNOWN = {**ROOT_SETS, "partner": RootSet((b"partner",), 1), "internal": RootSet((b"internal",), 1)}


class World:
    """Volumes, and an authority that responds after a second with ``result``."""

    def __init__(self, max_certificates: int = 10) -> None:
        self.shared = SharedCertificates(self.find, lambda: KNOWN, self.now, max_certificates)
        self.result: ObtainedCertificate | Exception = obtained_certificate()
        self.stored: ObtainedCertificate | None = None
        self.requests = 0
        self.searches = 0

    @staticmethod
    def now() -> float:
        return asyncio.get_running_loop().time()

    async def find(self, _key: RequestKey) -> ObtainedCertificate | None:
        self.searches += 1
        return self.stored

    async def request(self) -> ObtainedCertificate:
        self.requests += 1
        await asyncio.sleep(1)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def obtain(
        self, spec: CertificateSpec = SPEC, key: RequestKey = KEY, *, is_renewal: bool = False
    ) -> Awaitable[ObtainedCertificate]:
        return self.shared.obtain(key, spec, self.request, is_renewal=is_renewal)

    async def failure(self, spec: CertificateSpec = SPEC, *, is_renewal: bool = False) -> Reason:
        with pytest.raises(CertmountError) as failure:
            await self.obtain(spec, is_renewal=is_renewal)
        return failure.value.reason


@in_virtual_time
async def test_one_volume_sends_the_request_for_all() -> None:
    world = World()
    obtained = await asyncio.gather(*(world.obtain() for _ in range(20)))
    assert len({id(each.verified) for each in obtained}) == 1
    await world.obtain()
    assert world.requests == 1


@in_virtual_time
async def test_certificate_due_for_renewal_is_used_by_new_volumes_only() -> None:
    """A pod starts immediately and renews afterwards."""
    world = World()
    await world.obtain()
    await asyncio.sleep(50)
    await world.obtain(is_renewal=True)
    assert world.requests == 1
    await asyncio.sleep(15)
    world.result = obtained_certificate(66, 1000, 2000)
    assert (await world.obtain()).renew_at == 60
    assert (await world.obtain(is_renewal=True)).renew_at == 1000
    assert world.requests == 2


@in_virtual_time
async def test_overdue_certificate_is_not_used_by_new_volumes() -> None:
    world = World()
    await world.obtain()
    await asyncio.sleep(81)
    await world.obtain()
    assert world.requests == 2


@in_virtual_time
async def test_earlier_renewal_of_one_volume_renews_for_all() -> None:
    early = replace(SPEC, renew_before=timedelta(seconds=70))
    world = World()
    await world.obtain()
    assert (await world.obtain(early)).renew_at == 30
    await asyncio.sleep(35)
    world.result = obtained_certificate(36, 1000, 2000)
    assert (await world.obtain(early, is_renewal=True)).renew_at == 1000
    assert (await world.obtain(is_renewal=True)).renew_at == 1000
    assert world.requests == 2


@in_virtual_time
async def test_each_volume_gets_the_root_sets_that_it_requests() -> None:
    federated, unknown = replace(SPEC, federations=("partner",)), replace(SPEC, federations=("unknown",))
    world = World()
    assert set((await world.obtain()).root_sets) == {"acme"}
    assert set((await world.obtain(federated)).root_sets) == {"acme", "partner"}
    assert await world.failure(unknown) is Reason.FEDERATION_NOT_FOUND
    await world.obtain()
    assert world.requests == 1


@in_virtual_time
async def test_unknown_federation_rejected_by_the_authority_does_not_end_the_sharing() -> None:
    world = World()
    await world.obtain()
    await asyncio.sleep(65)
    world.result = CertmountError(Reason.FEDERATION_NOT_FOUND, "unknown")
    reasons = await asyncio.gather(*(world.failure(is_renewal=True) for _ in range(3)))
    assert set(reasons) == {Reason.FEDERATION_NOT_FOUND}
    assert world.requests == 4
    assert (await world.obtain()).renew_at == 60


@in_virtual_time
async def test_interim_certificate_comes_with_the_internal_roots() -> None:
    world = World()
    world.result = obtained_certificate(0, 15, 100, interim=True)
    assert set((await world.obtain()).root_sets) == {"acme", "internal"}
    await asyncio.sleep(20)
    world.result = obtained_certificate(20, 60, 100)
    assert set((await world.obtain(is_renewal=True)).root_sets) == {"acme"}


@in_virtual_time
async def test_failure_of_the_issuer_affects_all_waiting_volumes() -> None:
    world = World()
    world.result = CertmountError(Reason.ISSUANCE_PENDING, "the CA is still working")
    reasons = await asyncio.gather(*(world.failure() for _ in range(5)))
    assert set(reasons) == {Reason.ISSUANCE_PENDING}
    assert world.requests == 1


@in_virtual_time
@pytest.mark.parametrize(
    "reason", [Reason.TOKEN_EXPIRED, Reason.POD_NOT_FOUND, Reason.TOKEN_REJECTED, Reason.NAME_NOT_ALLOWED]
)
async def test_failure_of_one_pod_does_not_affect_others(reason: Reason) -> None:
    """The next volume sends a request: its token can be valid."""
    world = World()
    world.result = CertmountError(reason, "no")
    await asyncio.gather(*(world.failure() for _ in range(3)))
    assert world.requests == 3


@in_virtual_time
async def test_next_volume_sends_the_request_after_a_cancellation() -> None:
    world = World()
    first = asyncio.ensure_future(world.obtain())
    await asyncio.sleep(0.5)
    second = asyncio.ensure_future(world.obtain())
    third = asyncio.ensure_future(world.obtain())
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    assert (await third).renew_at == 60
    assert world.requests == 2
    world.result = ValueError("a defect")
    other = RequestKey.of(POD, SPEC, "x")
    await asyncio.gather(world.obtain(key=other), world.obtain(key=other), return_exceptions=True)
    assert world.requests == 4


@in_virtual_time
@pytest.mark.parametrize("reason", [Reason.SERVICE_ACCOUNT_DENIED, Reason.NAME_NOT_ALLOWED])
async def test_rejected_renewal_ends_the_sharing(reason: Reason) -> None:
    world = World()
    world.stored = await world.obtain()
    await asyncio.sleep(65)
    world.result = CertmountError(reason, "denied")
    assert await world.failure(is_renewal=True) is reason
    assert await world.failure() is reason
    assert world.requests == 3


@in_virtual_time
async def test_rate_limit_does_not_end_the_sharing() -> None:
    world = World()
    await world.obtain()
    await asyncio.sleep(65)
    world.result = CertmountError(Reason.TOO_MANY_REQUESTS, "five a week")
    assert await world.failure(is_renewal=True) is Reason.TOO_MANY_REQUESTS
    assert (await world.obtain()).renew_at == 60


@in_virtual_time
async def test_restarted_driver_searches_the_volumes_once() -> None:
    world = World()
    world.stored = obtained_certificate()
    await asyncio.gather(*(world.obtain() for _ in range(3)))
    await world.obtain()
    assert (world.requests, world.searches) == (0, 1)


@in_virtual_time
async def test_least_recently_used_certificate_is_removed_first() -> None:
    others = [RequestKey.of(replace(POD, service_account=f"sa-{number}"), SPEC) for number in range(4)]
    world = World(6)  # a namespace with several service accounts holds two
    for other in others[:2]:
        await world.obtain(key=other)
    await world.obtain(key=others[0])
    await world.obtain(key=others[2])
    assert world.requests == 3
    await world.obtain(key=others[0])
    assert world.requests == 3
    await world.obtain(key=others[1])
    assert world.requests == 4
    await asyncio.sleep(200)
    world.result = obtained_certificate(200, 300, 400)
    await world.obtain(key=others[3])
    assert len(world.shared._certificates) == 1
    await asyncio.sleep(300)
    world.shared.update({"acme"})
    assert not world.shared._certificates


@in_virtual_time
async def test_authority_decides_which_certificates_are_shared() -> None:
    world = World()
    assert not await world.shared.is_shared("internal")
    with pytest.raises(CertmountError, match="has not reported yet") as failure:
        await world.shared.is_shared("acme")
    assert failure.value.retryable
    asyncio.get_running_loop().call_later(5, world.shared.update, {"acme"})
    assert await world.shared.is_shared("acme")
    assert not await world.shared.is_shared("other")
    world.shared.update(frozenset())
    assert not await world.shared.is_shared("acme")
