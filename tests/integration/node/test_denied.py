"""Renewals of denied pods stop until the policy changes, and certificate conditions are reported."""

from __future__ import annotations

import functools
from datetime import timedelta

import pytest

from csi_driver._proto import authority_pb2
from csi_driver._proto.csi_pb2 import DEGRADED
from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.world import Node
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import name_not_allowed
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def _reported(node: Node) -> list[tuple[int, str]]:
    return [(report.condition, report.reason) for report in node.authority.reports]


async def test_denied_renewal_stops_until_the_policy_changes(node: Node) -> None:
    await node.watched()
    node.authority.reports.clear()
    node.script.renew_after = timedelta(seconds=1)
    request = await node.published()
    before = node.shown(request)
    node.script.failure = CertmountError(Reason.SERVICE_ACCOUNT_DENIED, "web/shop: compromised")
    await until(lambda: node.driver.events("renewal stopped"), "the renewal stops")
    await until(lambda: _reported(node), "the report")
    assert _reported(node) == [(authority_pb2.CONDITION_RENEWAL_STOPPED, "ServiceAccountDenied")]
    assert "compromised" in node.authority.reports[0].message
    ((_, reason, message),) = await node.health(request)
    assert reason == "ServiceAccountDenied"
    assert "the driver does not retry before the policy changes" in message
    await until(
        lambda: node.metric("certmount_node_volumes_unhealthy", reason="ServiceAccountDenied") == 1, "the metric"
    )
    node.script.failure = node.script.renew_after = None
    await node.publish(request)
    await node.authority.send_bundle()
    other = await node.published()
    assert (node.script.calls, node.shown(request)) == (3, before)
    node.authority.policy = "another"
    await node.authority.send_bundle()
    await until(lambda: node.shown(request).serial != before.serial, "renewed", timeout_s=40.0)
    assert await node.health(request) == []
    await until(lambda: len(_reported(node)) == 2, "the report of recovery")
    assert _reported(node)[1] == (authority_pb2.CONDITION_RECOVERED, "")
    assert node.shown(other).names


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "after-restart"])
async def test_key_of_a_denied_pod_is_not_reused(node: Node, restarted: bool) -> None:
    """An administrator who denied a pod because its key was stolen can remove it from the deny list later."""
    await node.watched()
    node.script.renew_after = timedelta(seconds=1)
    attributes = {"reuse-key": "true"}
    pod = FakePod()
    request = await node.published(pod, attributes)
    before = node.shown(request)
    node.script.failure = CertmountError(Reason.SERVICE_ACCOUNT_DENIED, "web/shop: compromised")
    denied = functools.partial(node.metric, "certmount_node_volumes_unhealthy", reason="ServiceAccountDenied")
    await until(lambda: denied() == 1, "the renewal is denied")
    assert node.record(request)["replace_key"]
    node.script.failure = node.script.renew_after = None
    if restarted:
        await node.restart()
        await node.publish(node.kubelet.publish_request(pod, attributes))
    else:
        node.authority.policy = "without the entry"
        await node.authority.send_bundle()
    await until(lambda: node.shown(request).serial != before.serial, "renewed", timeout_s=40.0)
    assert node.shown(request).key != before.key
    await until(lambda: not node.record(request)["replace_key"], "the record of the new key")


async def test_renewal_that_is_not_allowed_is_reported_once_and_recovers_when_the_policy_is_fixed(node: Node) -> None:
    """The second failure is reported, with the pod's token. The pod keeps its files."""
    node.authority.reports.clear()
    node.script.renew_after = timedelta(seconds=1)
    request = await node.published(attributes={"name": "shop.example.com"})
    token, before = node.script.tokens[-1], node.shown(request)
    node.script.failure = name_not_allowed("shop.example.com")
    await until(lambda: node.script.calls > 3, "three failures")
    assert _reported(node) == [(authority_pb2.CONDITION_RENEWAL_FAILING, "NameNotAllowed")]
    assert node.authority.reports[0].pod_token == token
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "NameNotAllowed")
    assert "shop.example.com: no policy rule allows this name" in message
    assert node.shown(request) == before
    node.script.failure = node.script.renew_after = None
    await until(lambda: node.shown(request).serial != before.serial, "renewed")
    assert await node.health(request) == []
    await until(lambda: len(_reported(node)) == 2, "the report of recovery")


async def test_overdue_and_expired_certificates_are_reported(node: Node) -> None:
    node.authority.reports.clear()
    node.script.lifetime = timedelta(seconds=3)
    request = await node.published()
    before = node.shown(request)
    node.script.failure = CertmountError(Reason.INVALID_RESPONSE, "nonsense")
    await until(lambda: (authority_pb2.CONDITION_EXPIRED, "InvalidResponse") in _reported(node), "expired")
    assert authority_pb2.CONDITION_OVERDUE in [condition for condition, _ in _reported(node)]
    node.script.failure, node.script.lifetime = None, timedelta(hours=1)
    await until(lambda: node.shown(request).serial != before.serial, "the renewal")
