"""The Secrets controller follows the trust stream whatever fails, and a metric shows whether it receives roots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.rpc.authority_messages import TrustBundle
from csi_driver.secrets.trust_follower import follow_trust
from csi_driver.telemetry.secrets_metrics import SecretsMetrics
from tests.support.waiting import in_background
from tests.unit.node.virtual_time import run_virtually

_BUNDLE = TrustBundle({"internal": RootSet((b"root",), 1)}, "")
_REJECTED = CertmountError(Reason.TOKEN_REJECTED, "rejected")


class _Source:
    """Rejects the controller for the given number of streams. Later streams deliver a bundle and end after a minute."""

    def __init__(self, rejections: int) -> None:
        self.rejections = rejections

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        if self.rejections:
            self.rejections -= 1
            raise _REJECTED
        yield _BUNDLE
        await asyncio.sleep(60)


def _connected(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("certmount_secrets_trust_stream_connected")


def test_metric_is_0_while_the_authority_rejects_the_controller() -> None:
    registry = CollectorRegistry()
    metrics = SecretsMetrics(registry)
    bundles: list[TrustBundle] = []

    async def follow() -> None:
        source = _Source(10**6)
        async with in_background(
            follow_trust(source.watch_trust, bundles.append, lambda: None, metrics.trust_reported)
        ):
            await asyncio.sleep(3600)
            assert (_connected(registry), bundles) == (0, [])
            source.rejections = 0
            await asyncio.sleep(60)
            assert (_connected(registry), bundles) == (1, [_BUNDLE])
        assert _connected(registry) == 0  # another replica leads

    run_virtually(follow())


def test_end_of_a_stream_is_reported() -> None:
    reports: list[bool] = []
    recoveries: list[None] = []

    async def follow() -> None:
        following = follow_trust(
            _Source(1).watch_trust, lambda _: None, lambda: recoveries.append(None), reports.append
        )
        async with in_background(following):
            await asyncio.sleep(100)

    run_virtually(follow())
    assert reports == [False, True, False, True, False]
    assert len(recoveries) == 1


def test_bundle_that_is_not_applied_does_not_count() -> None:
    reports: list[bool] = []

    def reject(_: TrustBundle) -> None:
        raise CertmountError(Reason.INVALID_RESPONSE, "invalid")

    async def follow() -> None:
        async with in_background(follow_trust(_Source(0).watch_trust, reject, lambda: None, reports.append)):
            await asyncio.sleep(100)

    run_virtually(follow())
    assert set(reports) == {False}
