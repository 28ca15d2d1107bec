"""Issuers outside that take longer than a call and count what they sign: one order, however often and by however many pods it is asked for."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from csi_driver._proto.authority_pb2 import CONDITION_OVERDUE
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.world import Failure, Node, Request, failure_of, running_node
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import Response, answer_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = {"issuer": "acme", "name": "shop.example.com"}
"""What the pods of a Deployment ask for; acme's certificates are shared."""
ALONE = {"issuer": "slow", "name": "shop.example.com"}
"""The same of an issuer that counts nothing."""
NEVER = timedelta(hours=1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_node() -> AsyncIterator[Node]:
    """A node whose authority has two issuers outside, which the node knows."""
    async with running_node() as node:
        await node.authority.open_issuer("acme", sharing=True)
        await node.authority.open_issuer("slow", sharing=False)
        await until(lambda: node.authority.confirmed_of("acme") and node.authority.confirmed_of("slow"), "the issuers")
        yield node


def _roots(node: Node, request: Request) -> set[str]:
    """Whose roots the pod trusts."""
    cas = {"internal": node.authority.ca, **node.authority.outside}
    shown = node.shown(request).roots
    return {name for name, ca in cas.items() if ca.certificate in shown}


async def _pending(node: Node, request: Request) -> Failure:
    """A publish that fails as the order is on its way; the kubelet then removes what there is of the volume."""
    failure = await failure_of(node.publish(request))
    assert failure.reason == "IssuancePending"
    await node.unpublish(request)
    node.assert_nothing_of(request)
    return failure


@pytest.fixture
def shop() -> FakePod:
    """A pod of a service account of its own for each test: certificates outlive the pods that asked for them."""
    return FakePod(service_account=f"shop-{uuid.uuid4()}")


def _again(pod: FakePod, number: int = 0) -> FakePod:
    """Another pod of the same service account."""
    return FakePod(pod.namespace, f"{pod.name}-{number}", pod.service_account)


async def test_twenty_pods_at_once_are_one_order(node: Node, shop: FakePod) -> None:
    """A Deployment comes to a node: one question, one certificate, twenty volumes with files of their own."""
    node.script.delay_s = 0.5
    requests = [node.request(_again(shop, number), EDGE) for number in range(20)]
    await asyncio.gather(*(node.publish(request) for request in requests))
    assert (node.script.calls, len(node.script.orders)) == (1, 1)
    assert len({node.shown(request).serial for request in requests}) == 1
    assert len({node.volume_dir(request) for request in requests}) == 20
    assert node.shown(requests[0]).names == ["shop.example.com"]
    assert _roots(node, requests[7]) == {"acme"}


async def test_a_pod_that_crashes_and_comes_back_burns_nothing(node: Node, shop: FakePod) -> None:
    """Ten pods one after another, each removed before the next: the CA hears of the first one only."""
    serials = set()
    for number in range(10):
        request = await node.published(_again(shop, number), EDGE)
        serials.add(node.shown(request).serial)
        await node.unpublish(request)
    assert (node.script.calls, len(serials)) == (1, 1)


async def test_each_volume_has_its_own_group(node: Node, shop: FakePod) -> None:
    """The certificate is shared, files are not: each pod's group may read its own copy of the key."""
    one = await node.published(_again(shop, 1), {**EDGE, "fs-group": "3001"})
    two = await node.published(_again(shop, 2), {**EDGE, "fs-group": "3002"})
    if node.real_mounts:
        assert [(node.target(each, "site.key")).stat().st_gid for each in (one, two)] == [3001, 3002]
    assert node.shown(one).key == node.shown(two).key


@pytest.mark.parametrize(
    "other, attributes",
    [
        (FakePod(service_account="other"), {}),
        (FakePod(namespace="other"), {}),
        (None, {"usages": "server"}),
        (None, {"duration": "2h"}),
        (None, {"key-type": "EC-P384"}),
        (None, {"dns-names": "other.example.com"}),
        (None, {"issuer": "slow"}),
    ],
)
async def test_nobody_else_gets_it(
    node: Node, shop: FakePod, other: FakePod | None, attributes: dict[str, str]
) -> None:
    """Another service account or namespace, or the same that asks for anything else, asks the authority, and shows its own token."""
    held = node.shown(await node.published(shop, EDGE))
    pod = FakePod(other.namespace, shop.name, other.service_account) if other else _again(shop)
    if other and other.namespace != shop.namespace:
        pod = FakePod(other.namespace, shop.name, shop.service_account)
    shown = node.shown(await node.published(pod, {**EDGE, **attributes}))
    assert node.script.calls == 2
    assert shown.key != held.key
    assert shown.serial != held.serial


async def test_what_the_authority_refuses_is_not_taken_from_another(node: Node, shop: FakePod) -> None:
    """A hostile service account asks for the names that a held certificate has: the refusal is all it gets."""
    await node.published(shop, EDGE)
    node.script.failure = CertmountError(Reason.NAME_NOT_ALLOWED, "shop.example.com: no policy rule allows this name")
    hostile = node.request(FakePod(shop.namespace, "hostile", "hostile"), EDGE)
    assert (await failure_of(node.publish(hostile))).reason == "NameNotAllowed"
    node.assert_nothing_of(hostile)


async def test_a_pod_without_its_token_gets_nothing_that_is_held(node: Node, shop: FakePod) -> None:
    """The token says which pod it is; without one even a certificate that lies ready is not handed out."""
    await node.published(shop, EDGE)
    bare = node.request(_again(shop), EDGE, token=None)
    assert (await failure_of(node.publish(bare))).reason == "TokenMissing"


async def test_internal_certificates_are_nobody_elses(node: Node, shop: FakePod) -> None:
    """What costs nothing is not shared: each volume has a key of its own."""
    one, two = [node.shown(await node.published(_again(shop, number))) for number in (1, 2)]
    assert one.key != two.key


@pytest.mark.parametrize("attributes", [EDGE, ALONE])
async def test_an_order_outlasts_the_call_and_the_volume(node: Node, shop: FakePod, attributes: dict[str, str]) -> None:
    """Pending again and again, the volume removed each time: all questions hold the very same CSR, and the last one gets the certificate."""
    node.script.finished = False
    request = node.request(shop, attributes)
    for _ in range(3):
        failure = await _pending(node, request)
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert "the CA is at it" in failure.text
    node.script.finished = True
    await node.publish(request)
    assert len(node.script.csrs) == 4
    assert len(set(node.script.csrs)) == 1
    assert len(node.script.orders) == 1
    assert node.shown(request).names == ["shop.example.com"]


async def test_volumes_that_share_nothing_have_orders_of_their_own(node: Node, shop: FakePod) -> None:
    """Two pods, one issuer that does not share: two keys, whatever is pending."""
    node.script.finished = False
    for number in (1, 2):
        await _pending(node, node.request(_again(shop, number), ALONE))
    assert len(node.script.orders) == 2


async def test_a_kubelet_that_loses_its_patience_comes_back(node: Node, shop: FakePod) -> None:
    """The call is cancelled in the middle of the question, the volume removed; the next call asks with the same CSR."""
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


async def test_no_pod_of_the_internal_ca_waits_behind_a_slow_issuer(node: Node) -> None:
    """Twenty pods hang at an issuer outside: one with an internal certificate starts all the same."""
    node.script.gate_outside = asyncio.Event()
    hanging = [node.request(FakePod(), ALONE) for _ in range(20)]
    calls = [asyncio.ensure_future(node.publish(request)) for request in hanging]
    await until(lambda: node.script.calls == 20, "the questions of all")
    await node.published()
    node.script.gate_outside.set()
    await asyncio.gather(*calls)


async def test_who_waits_for_anothers_question_hears_its_answer(node: Node, shop: FakePod) -> None:
    """Five pods wait for one order that is pending in the end: each is told so, and none asks again by itself."""
    node.script.finished, node.script.delay_s = False, 0.5
    requests = [node.request(_again(shop, number), EDGE) for number in range(5)]
    failures = await asyncio.gather(*(failure_of(node.publish(request)) for request in requests))
    assert {failure.reason for failure in failures} == {"IssuancePending"}
    assert node.script.calls == 1


async def test_a_pod_that_goes_does_not_take_the_others_question_with_it(node: Node, shop: FakePod) -> None:
    """The call that asks for all is cancelled: one of those that wait asks in its place, with the same CSR."""
    node.script.gate = asyncio.Event()
    first, second = (node.request(_again(shop, number), EDGE) for number in range(2))
    going = asyncio.ensure_future(node.publish(first))
    await until(lambda: node.script.calls, "the question")
    waiting = asyncio.ensure_future(node.publish(second))
    going.cancel()
    await until(lambda: node.script.calls == 2, "the question of the other")
    node.script.gate.set()
    await waiting
    assert len(set(node.script.csrs)) == 1
    await asyncio.gather(going, return_exceptions=True)


async def test_a_certificate_that_does_not_fit_costs_one_order(node: Node, shop: FakePod) -> None:
    """Its chain ends at no root that is known: each try is for the same order, so that a wrong setting can't burn a limit."""
    stranger = node.authority.ca
    node.script.tamper = lambda answer: _with_root(answer, stranger.der)
    request = node.request(shop, EDGE)
    for _ in range(3):
        assert (await failure_of(node.publish(request))).reason == "InvalidResponse"
    assert len(node.script.orders) == 1


def _with_root(answer: Response, root: bytes) -> Response:
    changed = answer_of(answer.chain, [root])
    changed.trust["acme"].CopyFrom(changed.trust["internal"])
    return changed


async def test_after_a_refusal_the_next_question_has_another_key(node: Node, shop: FakePod) -> None:
    """A final answer ends the request: what comes next is a new one."""
    request = node.request(shop, EDGE)
    node.script.failure = CertmountError(Reason.NAME_NOT_ALLOWED, "no")
    assert (await failure_of(node.publish(request))).reason == "NameNotAllowed"
    node.script.failure = None
    await node.publish(request)
    assert len(set(node.script.csrs)) == 2


async def test_a_renewal_is_one_question_for_all(node: Node, shop: FakePod) -> None:
    """Five volumes come to their moment together: one order, and each of them shows what came of it."""
    node.script.renew_after = timedelta(seconds=3)
    requests = [node.request(_again(shop, number), EDGE) for number in range(5)]
    await asyncio.gather(*(node.publish(request) for request in requests))
    before = node.shown(requests[0]).serial
    node.script.renew_after = NEVER
    await until(
        lambda: all(node.shown(request).serial != before for request in requests), "the renewal of all", patience_s=20
    )
    assert len({node.shown(request).serial for request in requests}) == 1
    assert len(node.script.orders) == 2


@pytest.mark.parametrize("restarted", [False, True], ids=["in memory", "after a restart of the driver"])
async def test_what_a_ca_wants_renewed_at_once_is_renewed(node: Node, shop: FakePod, restarted: bool) -> None:
    """A CA that has to take back what it signed moves the moment of renewal: one order for all that share it, and no one else asks."""
    node.script.renew_after = NEVER
    shared = [await node.published(_again(shop, number), EDGE) for number in range(2)]
    other = await node.published(_again(shop, 2), {"issuer": "acme", "name": "other.example.com"})
    before, left_alone = node.shown(shared[0]), node.shown(other)
    if restarted:
        await node.restart()
        for request in shared:  # the kubelet brings the tokens again
            await node.publish(request)
    orders = len(node.script.orders)
    node.authority.due = (key_fingerprint(before.leaf.public_key()),)  # type: ignore[arg-type]  # a key of ours
    await node.authority.tell()
    await until(
        lambda: all(node.shown(request).serial != before.serial for request in shared), "the renewal", patience_s=60
    )
    assert node.shown(shared[0]).key == node.shown(shared[1]).key != before.key
    assert node.shown(other) == left_alone
    assert len(node.script.orders) == orders + 1
    node.authority.due = ()
    await node.authority.tell()


async def test_who_is_denied_at_the_renewal_ends_the_sharing(node: Node, shop: FakePod) -> None:
    """A renewal is refused by the deny list: a new pod of the service account is not given what is held."""
    node.script.renew_after = timedelta(seconds=2)
    await node.published(_again(shop, 1), EDGE)
    denied = CertmountError(Reason.SERVICE_ACCOUNT_DENIED, "the service account is denied")
    node.script.failure = denied
    await until(lambda: node.driver.events("renewal stopped"), "the refusal", patience_s=20)
    calls = node.script.calls
    request = node.request(_again(shop, 2), EDGE)
    assert (await failure_of(node.publish(request))).reason == "ServiceAccountDenied"
    assert node.script.calls == calls + 1


async def test_a_driver_that_starts_anew_takes_what_a_volume_holds(node: Node, shop: FakePod) -> None:
    """Memory is gone, the files of a live volume are not: the next pod gets the same certificate without a question."""
    held = node.shown(await node.published(_again(shop, 1), EDGE))
    await node.restart()
    taken = node.shown(await node.published(_again(shop, 2), EDGE))
    assert taken.key == held.key
    assert node.script.calls == 1


async def test_a_stand_in_is_exchanged_in_place(node: Node, shop: FakePod) -> None:
    """The pod starts at once with a certificate of the internal CA for its key; the running pod sees the public one when it is there."""
    node.script.finished, node.script.stand_in = False, timedelta(seconds=1)
    request = await node.published(shop, EDGE)
    mounts = node.mounts(node.kubelet.root)
    before = node.shown(request)
    assert _roots(node, request) == {"internal", "acme"}
    assert any(name.startswith("spiffe://") for name in before.names)
    calls = node.script.calls
    await until(lambda: node.script.calls >= calls + 2, "two more questions", patience_s=20)
    assert node.shown(request) == before, "a stand-in that is well is not exchanged for another one"
    assert await node.health(request) == []
    node.script.finished = True
    await until(lambda: node.shown(request).serial != before.serial, "the exchange", patience_s=20)
    after = node.shown(request)
    assert after.key == before.key
    assert after.names == ["shop.example.com"]
    assert node.mounts(node.kubelet.root) == mounts
    assert len(node.script.orders) == len(set(node.script.csrs)) == 1
    assert _roots(node, request) == {"acme"}


async def test_a_restart_in_the_middle_of_an_order_makes_no_second_one(node: Node, shop: FakePod) -> None:
    """The driver dies while a stand-in is in place: the new one asks on with the key that lies in the volume."""
    node.script.finished, node.script.stand_in = False, timedelta(seconds=1)
    request = await node.published(shop, EDGE)
    before = node.shown(request)
    await node.restart()
    assert _roots(node, request) == {"internal", "acme"}
    await node.publish(node.kubelet.publish_request(shop, EDGE))
    calls = node.script.calls
    await until(lambda: node.script.calls > calls, "a question of the new driver", patience_s=20)
    assert node.shown(request).chain == before.chain
    node.script.finished = True
    await until(lambda: node.shown(request).serial != before.serial, "the exchange", patience_s=20)
    assert node.shown(request).key == before.key
    assert len(node.script.orders) == 1


async def test_the_roots_of_a_stand_in_stay_while_it_does(node: Node, shop: FakePod) -> None:
    """Another state of a set arrives meanwhile: the pod still trusts both CAs."""
    node.script.finished, node.script.stand_in = False, NEVER
    request = await node.published(shop, EDGE)
    internal, acme = node.authority.ca, node.authority.outside["acme"]
    generation = node.shown(request).generation
    await node.authority.trust(acme.der, internal.der, name="acme")
    await until(lambda: node.record(request) and _roots(node, request) == {"internal", "acme"}, "both roots")
    await node.authority.trust(acme.der, name="acme")
    assert _roots(node, request) == {"internal", "acme"}
    assert node.shown(request).generation == generation


async def test_an_order_that_is_pending_for_ever_is_told_and_asked_for_ever_less_often(
    node: Node, shop: FakePod
) -> None:
    """A renewal whose order does not end: the pod keeps what it has, the pauses grow; when it is overdue health says why, and the pod's event."""
    node.authority.reports.clear()
    node.script.renew_after, node.script.life = timedelta(seconds=1), timedelta(seconds=20)
    request = await node.published(shop, EDGE)
    before, logged = node.shown(request), len(node.driver.events("renewal failed"))
    node.script.finished = False
    await until(lambda: len(node.driver.events("renewal failed")) >= logged + 3, "three tries", patience_s=30)
    tries = node.driver.events("renewal failed")[logged:]
    assert {line["reason"] for line in tries} == {"IssuancePending"}
    for line, seconds in zip(tries, (1, 2, 4), strict=False):
        assert 0.7 * seconds <= line["retry_in_s"] <= 1.3 * seconds
    assert node.shown(request) == before
    assert await node.health(request) == [], "an order may take its minutes"
    await until(lambda: node.authority.reports, "a report", patience_s=20)
    assert [reason for _, reason, _ in await node.health(request)] == ["IssuancePending"]
    (report,) = node.authority.reports
    assert (report.condition, report.reason) == (CONDITION_OVERDUE, "IssuancePending")
    assert len(set(node.script.csrs)) == 2


async def test_no_key_of_an_order_is_ever_written_outside_its_volume(node: Node, shop: FakePod) -> None:
    """A pending key is in no log and in no file; the log tells of no CSR either."""
    node.script.finished = False
    await _pending(node, node.request(shop, ALONE))
    assert "PRIVATE KEY" not in node.driver.log_text()
    assert _files_with_keys(node.kubelet.root) == []


def _files_with_keys(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
