"""External issuers that take longer than a call and limit the number of certificates: retries and pods share one order."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from csi_driver._proto.authority_pb2 import CONDITION_OVERDUE
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.world import CallFailure, Node, Request, failure_of, running_node
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import Response, response_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = {"issuer": "acme", "name": "shop.example.com"}  # an issuer whose certificates are shared
ALONE = {"issuer": "slow", "name": "shop.example.com"}  # an issuer whose certificates are not shared
NEVER = timedelta(hours=1)
NOT_ALLOWED = CertmountError(Reason.NAME_NOT_ALLOWED, "shop.example.com: no policy rule allows this name")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_node() -> AsyncIterator[Node]:
    async with running_node() as node:
        await node.add_issuer("acme", shared=True)
        await node.add_issuer("slow", shared=False)
        yield node


def _roots(node: Node, request: Request) -> set[str]:
    cas = {"internal": node.authority.ca, **node.authority.external_issuers}
    return {name for name, ca in cas.items() if ca.certificate in node.shown(request).roots}


async def _pending(node: Node, request: Request) -> CallFailure:
    """Publish a volume whose order is pending. The kubelet then unpublishes it."""
    failure = await failure_of(node.publish(request))
    assert failure.reason == "IssuancePending"
    await node.unpublish(request)
    node.assert_nothing_of(request)
    return failure


async def _renewed(node: Node, requests: Sequence[Request], serial: int) -> None:
    await until(lambda: all(node.shown(request).serial != serial for request in requests), "renewal", timeout_s=60)


async def _requests(node: Node, more: int) -> None:
    calls = node.script.calls + more
    await until(lambda: node.script.calls >= calls, "more requests", timeout_s=20)


@pytest.fixture
def shop() -> FakePod:
    """Return a pod with its own service account, because certificates outlive their pods."""
    return FakePod(service_account=f"shop-{uuid.uuid4()}")


def _again(pod: FakePod, number: int = 0) -> FakePod:
    return FakePod(pod.namespace, f"{pod.name}-{number}", pod.service_account)


async def test_pods_that_start_together_share_one_order(node: Node, shop: FakePod) -> None:
    node.script.delay_s = 0.5
    requests = [node.request(_again(shop, number), EDGE) for number in range(20)]
    await asyncio.gather(*(node.publish(request) for request in requests))
    assert (node.script.calls, len(node.script.orders)) == (1, 1)
    assert len({node.shown(request).serial for request in requests}) == 1
    assert len({node.volume_dir(request) for request in requests}) == 20
    assert node.shown(requests[0]).names == ["shop.example.com"]
    assert _roots(node, requests[7]) == {"acme"}


async def test_restarted_pod_uses_the_existing_certificate(node: Node, shop: FakePod) -> None:
    serials = set()
    for number in range(10):
        request = await node.published(_again(shop, number), EDGE)
        serials.add(node.shown(request).serial)
        await node.unpublish(request)
    assert (node.script.calls, len(serials)) == (1, 1)


@pytest.mark.root
async def test_each_volume_has_its_own_group(node: Node, shop: FakePod) -> None:
    one = await node.published(_again(shop, 1), {**EDGE, "fs-group": "3001"})
    two = await node.published(_again(shop, 2), {**EDGE, "fs-group": "3002"})
    assert [(node.target(each, "site.key")).stat().st_gid for each in (one, two)] == [3001, 3002]
    assert node.shown(one).key == node.shown(two).key


@pytest.mark.parametrize(
    "namespace, service_account, attributes",
    [
        ("", "other", {}),
        ("other", "", {}),
        ("", "", {"usages": "server"}),
        ("", "", {"duration": "2h"}),
        ("", "", {"key-type": "EC-P384"}),
        ("", "", {"dns-names": "other.example.com"}),
        ("", "", {"issuer": "slow"}),
    ],
)
async def test_different_request_gets_its_own_certificate(
    node: Node, shop: FakePod, namespace: str, service_account: str, attributes: dict[str, str]
) -> None:
    shared = node.shown(await node.published(shop, EDGE))
    pod = FakePod(namespace or shop.namespace, f"{shop.name}-other", service_account or shop.service_account)
    shown = node.shown(await node.published(pod, {**EDGE, **attributes}))
    assert node.script.calls == 2
    assert shown.key != shared.key
    assert shown.serial != shared.serial


async def test_hostile_pod_does_not_get_the_shared_certificate(node: Node, shop: FakePod) -> None:
    """Neither another service account nor a pod without a token."""
    await node.published(shop, EDGE)
    bare = node.request(_again(shop), EDGE, token=None)
    assert (await failure_of(node.publish(bare))).reason == "TokenMissing"
    node.script.failure = NOT_ALLOWED
    hostile = node.request(FakePod(shop.namespace, "hostile", "hostile"), EDGE)
    assert (await failure_of(node.publish(hostile))).reason == "NameNotAllowed"
    node.assert_nothing_of(hostile)


async def test_internal_certificates_are_not_shared(node: Node, shop: FakePod) -> None:
    one, two = [node.shown(await node.published(_again(shop, number))) for number in (1, 2)]
    assert one.key != two.key


@pytest.mark.parametrize("attributes", [EDGE, ALONE])
async def test_order_outlives_the_call_and_the_volume(node: Node, shop: FakePod, attributes: dict[str, str]) -> None:
    node.script.finished = False
    request = node.request(shop, attributes)
    for _ in range(3):
        failure = await _pending(node, request)
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert "the CA has not issued the certificate yet" in failure.text
    node.script.finished = True
    await node.publish(request)
    assert len(node.script.csrs) == 4
    assert len(set(node.script.csrs)) == 1
    assert len(node.script.orders) == 1
    assert node.shown(request).names == ["shop.example.com"]


async def test_volumes_without_sharing_have_separate_orders(node: Node, shop: FakePod) -> None:
    node.script.finished = False
    for number in (1, 2):
        await _pending(node, node.request(_again(shop, number), ALONE))
    assert len(node.script.orders) == 2


async def test_request_after_a_cancelled_call_uses_the_same_csr(node: Node, shop: FakePod) -> None:
    node.script.gate = asyncio.Event()
    request = node.request(shop, EDGE)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await node.publish(request, timeout=1.0)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await node.unpublish(request)
    node.script.gate.set()
    await node.publish(request)
    assert len(node.script.csrs) == 2
    assert len(set(node.script.csrs)) == 1


async def test_internal_ca_does_not_wait_for_a_slow_issuer(node: Node) -> None:
    node.script.external_gate = asyncio.Event()
    waiting = [node.request(FakePod(), ALONE) for _ in range(20)]
    calls = [asyncio.ensure_future(node.publish(request)) for request in waiting]
    await until(lambda: node.script.calls == 20, "all requests")
    await node.published()
    node.script.external_gate.set()
    await asyncio.gather(*calls)


async def test_other_pod_continues_a_cancelled_request(node: Node, shop: FakePod) -> None:
    node.script.gate = asyncio.Event()
    first, second = (node.request(_again(shop, number), EDGE) for number in range(2))
    cancelled = asyncio.ensure_future(node.publish(first))
    await until(lambda: node.script.calls, "the request")
    waiting = asyncio.ensure_future(node.publish(second))
    cancelled.cancel()
    await until(lambda: node.script.calls == 2, "the request of the other pod")
    node.script.gate.set()
    await waiting
    assert len(set(node.script.csrs)) == 1
    await asyncio.gather(cancelled, return_exceptions=True)


async def test_invalid_certificate_causes_no_further_orders(node: Node, shop: FakePod) -> None:
    """All retries are for the same order, so a wrong configuration does not use up a rate limit."""
    stranger = node.authority.ca
    node.script.tamper = lambda answer: _with_root(answer, stranger.der)
    request = node.request(shop, EDGE)
    for _ in range(3):
        assert (await failure_of(node.publish(request))).reason == "InvalidResponse"
    assert len(node.script.orders) == 1


def _with_root(answer: Response, root: bytes) -> Response:
    changed = response_of(answer.chain, [root])
    changed.trust["acme"].CopyFrom(changed.trust["internal"])
    return changed


async def test_request_after_a_final_failure_uses_a_new_key(node: Node, shop: FakePod) -> None:
    request = node.request(shop, EDGE)
    node.script.failure = NOT_ALLOWED
    assert (await failure_of(node.publish(request))).reason == "NameNotAllowed"
    node.script.failure = None
    await node.publish(request)
    assert len(set(node.script.csrs)) == 2


@pytest.mark.parametrize("reason", [Reason.TOKEN_REJECTED, Reason.FEDERATION_NOT_FOUND])
async def test_failure_of_one_pod_keeps_the_shared_order(node: Node, shop: FakePod, reason: Reason) -> None:
    node.script.finished = False
    await _pending(node, node.request(_again(shop, 1), EDGE))
    node.script.failure = CertmountError(reason, "the authority rejected the request of this pod")
    rejected = node.request(_again(shop, 2), EDGE)
    assert (await failure_of(node.publish(rejected))).reason == reason.word
    await node.unpublish(rejected)
    node.script.failure, node.script.finished = None, True
    await node.publish(node.request(_again(shop, 3), EDGE))
    assert len(set(node.script.csrs)) == len(node.script.orders) == 1


async def test_volumes_share_one_renewal(node: Node, shop: FakePod) -> None:
    node.script.renew_after = timedelta(seconds=3)
    requests = [node.request(_again(shop, number), EDGE) for number in range(5)]
    await asyncio.gather(*(node.publish(request) for request in requests))
    before = node.shown(requests[0]).serial
    node.script.renew_after = NEVER
    await _renewed(node, requests, before)
    assert len({node.shown(request).serial for request in requests}) == 1
    assert len(node.script.orders) == 2


@pytest.mark.parametrize("restarted", [False, True], ids=["in-memory", "after-restart"])
async def test_early_renewal_suggested_by_the_ca(node: Node, shop: FakePod, restarted: bool) -> None:
    node.script.renew_after = NEVER
    shared = [await node.published(_again(shop, number), EDGE) for number in range(2)]
    other = await node.published(_again(shop, 2), {"issuer": "acme", "name": "other.example.com"})
    before, unaffected = node.shown(shared[0]), node.shown(other)
    if restarted:
        await node.restart()
        for request in shared:  # The kubelet sends the tokens again.
            await node.publish(request)
    orders = len(node.script.orders)
    node.authority.renew_now = (key_fingerprint(before.leaf.public_key()),)  # type: ignore[arg-type]  # The driver's own key type.
    await node.authority.send_bundle()
    await _renewed(node, shared, before.serial)
    assert node.shown(shared[0]).key == node.shown(shared[1]).key != before.key
    assert node.shown(other) == unaffected
    assert len(node.script.orders) == orders + 1
    node.authority.renew_now = ()
    await node.authority.send_bundle()


@pytest.mark.parametrize("revoked", [False, True])
async def test_key_is_reused_unless_the_ca_wants_an_earlier_renewal(node: Node, shop: FakePod, revoked: bool) -> None:
    """A CA that revokes certificates suggests an earlier renewal. Pods that share the certificate share the new key."""
    node.script.renew_after = NEVER
    attributes = EDGE | {"reuse-key": "true"}
    shared = [await node.published(_again(shop, number), attributes) for number in range(2)]
    before = node.shown(shared[0])
    node.authority.renew_now = (key_fingerprint(before.leaf.public_key()),)  # type: ignore[arg-type]  # The driver's own key type.
    node.authority.replace_keys = node.authority.renew_now if revoked else ()
    await node.authority.send_bundle()
    # The certificate in memory is not used either, if another certificate was issued for its key.
    await _renewed(node, shared if revoked else shared[:1], before.serial)
    assert (node.shown(shared[0]).key == before.key) != revoked
    assert len({node.shown(request).key for request in shared}) == 1
    node.authority.renew_now = node.authority.replace_keys = ()
    await node.authority.send_bundle()


async def test_denied_renewal_ends_the_sharing(node: Node, shop: FakePod) -> None:
    node.script.renew_after = timedelta(seconds=2)
    await node.published(_again(shop, 1), EDGE)
    node.script.failure = CertmountError(Reason.SERVICE_ACCOUNT_DENIED, "the service account is denied")
    await until(lambda: node.driver.events("renewal stopped"), "the failure", timeout_s=20)
    calls = node.script.calls
    request = node.request(_again(shop, 2), EDGE)
    assert (await failure_of(node.publish(request))).reason == "ServiceAccountDenied"
    assert node.script.calls == calls + 1


async def test_restarted_driver_shares_the_certificate_of_a_volume(node: Node, shop: FakePod) -> None:
    first = node.shown(await node.published(_again(shop, 1), EDGE))
    await node.restart()
    second = node.shown(await node.published(_again(shop, 2), EDGE))
    assert second.key == first.key
    assert node.script.calls == 1


async def test_interim_certificate_is_replaced_in_place(node: Node, shop: FakePod) -> None:
    node.script.finished, node.script.interim_renew_after = False, timedelta(seconds=1)
    request = await node.published(shop, EDGE)
    mounts = node.mounts(node.kubelet.root)
    before = node.shown(request)
    assert _roots(node, request) == {"internal", "acme"}
    assert any(name.startswith("spiffe://") for name in before.names)
    await _requests(node, 2)
    assert node.shown(request) == before
    assert await node.health(request) == []
    node.script.finished = True
    await _renewed(node, [request], before.serial)
    after = node.shown(request)
    assert after.key == before.key
    assert after.names == ["shop.example.com"]
    assert node.mounts(node.kubelet.root) == mounts
    assert len(node.script.orders) == len(set(node.script.csrs)) == 1
    assert _roots(node, request) == {"acme"}


async def test_restarted_driver_continues_a_pending_order(node: Node, shop: FakePod) -> None:
    node.script.finished, node.script.interim_renew_after = False, timedelta(seconds=1)
    request = await node.published(shop, EDGE)
    before = node.shown(request)
    await node.restart()
    assert _roots(node, request) == {"internal", "acme"}
    await node.publish(node.kubelet.publish_request(shop, EDGE))
    await _requests(node, 1)
    assert node.shown(request).chain == before.chain
    node.script.finished = True
    await _renewed(node, [request], before.serial)
    assert node.shown(request).key == before.key
    assert len(node.script.orders) == 1


async def test_new_roots_keep_the_roots_of_an_interim_certificate(node: Node, shop: FakePod) -> None:
    node.script.finished, node.script.interim_renew_after = False, NEVER
    request = await node.published(shop, EDGE)
    internal, acme = node.authority.ca, node.authority.external_issuers["acme"]
    generation = node.shown(request).generation
    await node.authority.trust(acme.der, internal.der, name="acme")
    await until(lambda: node.record(request) and _roots(node, request) == {"internal", "acme"}, "both roots")
    await node.authority.trust(acme.der, name="acme")
    assert _roots(node, request) == {"internal", "acme"}
    assert node.shown(request).generation == generation


async def test_pending_renewal_is_reported_when_it_is_overdue(node: Node, shop: FakePod) -> None:
    node.authority.reports.clear()
    node.script.renew_after, node.script.lifetime = timedelta(seconds=1), timedelta(seconds=20)
    request = await node.published(shop, EDGE)
    before, logged = node.shown(request), len(node.driver.events("renewal failed"))
    node.script.finished = False
    await until(lambda: len(node.driver.events("renewal failed")) >= logged + 3, "three failures", timeout_s=30)
    failures = node.driver.events("renewal failed")[logged:]
    assert {line["reason"] for line in failures} == {"IssuancePending"}
    for line, seconds in zip(failures, (1, 2, 4), strict=False):
        assert 0.7 * seconds <= line["retry_in_s"] <= 1.3 * seconds
    assert node.shown(request) == before
    assert await node.health(request) == []
    await until(lambda: node.authority.reports, "a report", timeout_s=20)
    assert [reason for _, reason, _ in await node.health(request)] == ["IssuancePending"]
    (report,) = node.authority.reports
    assert (report.condition, report.reason) == (CONDITION_OVERDUE, "IssuancePending")
    assert len(set(node.script.csrs)) == 2


async def test_pending_key_is_neither_logged_nor_written(node: Node, shop: FakePod) -> None:
    node.script.finished = False
    await _pending(node, node.request(shop, ALONE))
    assert "PRIVATE KEY" not in node.driver.log_text()
    files: list[Path] = [path for path in node.kubelet.root.rglob("*") if path.is_file()]
    assert [path for path in files if b"PRIVATE" in path.read_bytes()] == []
