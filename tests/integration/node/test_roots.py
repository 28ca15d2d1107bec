"""Roots reach every volume whatever replica tells them, and what has arrived everywhere is confirmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.host import syscalls
from tests.integration.node.world import Node, Request
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import TestCA, answer_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MS_RDONLY, _MS_REMOUNT = 1, 32


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def own_roots(node: Node) -> AsyncIterator[None]:
    """Each test begins and ends with the authority's own root alone."""
    await node.watched()
    yield
    node.authority.confirm_gate = None
    for name in [name for name in node.authority.sets if name != DEFAULT_ISSUER]:
        del node.authority.sets[name]
    await node.authority.trust(node.authority.ca.der)


def _roots(node: Node, request: Request) -> list[bytes]:
    return [root.public_bytes(Encoding.DER) for root in node.shown(request).roots]


def _generation(node: Node, name: str = DEFAULT_ISSUER) -> int:
    return node.authority.sets[name].generation


async def _hold(node: Node, requests: Sequence[Request], *roots: bytes) -> None:
    await until(lambda: all(_roots(node, request) == list(roots) for request in requests), "the roots")


async def _confirmed(node: Node, name: str = DEFAULT_ISSUER) -> None:
    await until(lambda: node.authority.confirmed_of(name) == _generation(node, name), "the confirmation")


async def test_a_volume_trusts_its_issuer_and_its_federations(node: Node) -> None:
    """root.crt is the union of the sets that the volume asks for, follows each of them, and holds no other's roots."""
    partner, later, own = TestCA("partner"), TestCA("later"), node.authority.ca.der
    await node.authority.trust(partner.der, name="partner")
    plain, federated = await node.published(), await node.published(attributes={"federations": "partner"})
    assert _roots(node, plain) == [own]
    assert _roots(node, federated) == [own, partner.der]
    state = node.state(plain)
    await node.authority.trust(partner.der, later.der, name="partner")
    await _hold(node, [federated], own, partner.der, later.der)
    await _confirmed(node, "partner")
    assert node.state(plain) == state
    del node.authority.sets["partner"]
    await node.authority.tell()
    await _hold(node, [federated], own)
    assert node.script.calls == 2


async def test_an_answer_that_is_ahead_of_the_stream(node: Node) -> None:
    """A newer set that comes with one volume's certificate reaches all, and an older one of the stream takes nothing back."""
    own, other = node.authority.ca.der, TestCA("ahead").der
    before = await node.published()
    ahead = _generation(node) + 1
    node.script.tamper = lambda answer: answer_of(answer.chain, [own, other], ahead)
    first = await node.published()
    assert _roots(node, first) == [own, other]
    await _hold(node, [before], own, other)
    node.authority.policy = "told again"
    await node.authority.tell()
    await node.authority.trust(own, TestCA("same generation").der)
    node.script.tamper = lambda answer: answer
    assert _roots(node, await node.published()) == [own, other]
    assert _roots(node, before) == _roots(node, first) == [own, other]


async def test_an_answer_that_is_behind_the_stream(node: Node) -> None:
    """A replica that has not read the newest roots signs: the volume gets the newest ones all the same."""
    own, other = node.authority.ca.der, TestCA("newest").der
    waits = await node.published()
    await node.authority.trust(own, other)
    await _hold(node, [waits], own, other)
    node.script.tamper = lambda answer: answer_of(answer.chain, [own], _generation(node) - 1)
    assert _roots(node, await node.published()) == [own, other]


async def test_roots_that_come_while_volumes_are_published(node: Node) -> None:
    """Sets change again and again while pods start: in the end all hold the newest ones, none ever lacks its own issuer's."""
    own, requests = node.authority.ca.der, [node.request() for _ in range(20)]
    publishing = asyncio.gather(*(node.publish(request) for request in requests))
    several = [TestCA(f"number {number}").der for number in range(10)]
    for each in several:
        await node.authority.trust(own, each)
        await asyncio.sleep(0)
    await publishing
    assert all(own in _roots(node, request) for request in requests)
    await _hold(node, requests, own, several[-1])
    await _confirmed(node)


@pytest.mark.root
async def test_one_volume_that_fails_holds_up_no_other(node: Node) -> None:
    """One of fifty can't be written: the others follow at once, nothing is confirmed, and it is tried until it heals."""
    requests = [node.request(FakePod(name=f"shop-{number}")) for number in range(50)]
    await asyncio.gather(*(node.publish(request) for request in requests))
    await _confirmed(node)
    own, other, bad = node.authority.ca.der, TestCA("another").der, requests[17]
    folder = str(node.volume_dir(bad))
    syscalls.mount(None, folder, None, _MS_REMOUNT | _MS_RDONLY)
    try:
        await node.authority.trust(own, other)
        await _hold(node, [request for request in requests if request is not bad], own, other)
        await until(lambda: node.metric("certmount_node_volumes_roots_behind") == 1, "the failure")
        assert _roots(node, bad) == [own]
        await until(lambda: len(node.driver.events("roots not replaced")) > 1, "another try")
        assert node.authority.confirmed_of() < _generation(node)
    finally:
        syscalls.mount(None, folder, None, _MS_REMOUNT)
    await _hold(node, requests, own, other)
    await _confirmed(node)
    assert node.metric("certmount_node_volumes_roots_behind") == 0


async def test_killed_between_write_and_confirmation(node: Node) -> None:
    """The next process finds the volume as it is, writes nothing, and confirms."""
    request, own, other = await node.published(), node.authority.ca.der, TestCA("another").der
    node.authority.confirm_gate = asyncio.Event()
    await node.authority.trust(own, other)
    await _hold(node, [request], own, other)
    state = node.state(request)
    await node.driver.kill()
    node.authority.confirm_gate.set()
    node.authority.confirmed.clear()
    await node.driver.start()
    await _confirmed(node)
    assert node.state(request) == state


async def test_roots_that_changed_while_no_driver_ran(node: Node) -> None:
    """A restarted driver leaves root.crt as it is until it hears of the sets, then brings it up to date and confirms."""
    partner, own, other = TestCA("partner").der, node.authority.ca.der, TestCA("another").der
    await node.authority.trust(partner, name="partner")
    request = await node.published(attributes={"federations": "partner"})
    await node.driver.kill()
    await node.authority.stop()
    node.authority.sets[DEFAULT_ISSUER] = RootSet((own, other), _generation(node) + 1)
    await node.driver.start()
    assert _roots(node, request) == [own, partner]
    await node.authority.start()
    await _hold(node, [request], own, other, partner)
    await _confirmed(node)


async def test_root_crt_is_never_empty(node: Node) -> None:
    """The authority knows none of a volume's sets any more: the pod keeps what it has."""
    request, own = await node.published(), node.authority.sets[DEFAULT_ISSUER]
    state = node.state(request)
    await node.authority.trust(TestCA("another").der, name="partner")
    del node.authority.sets[DEFAULT_ISSUER]
    await node.authority.tell()
    await _confirmed(node, "partner")
    assert node.state(request) == state
    node.authority.sets[DEFAULT_ISSUER] = own


async def test_a_pod_that_is_gone_is_not_waited_for(node: Node) -> None:
    """A volume whose pod vanished is removed when its roots are to be written, and the others' are confirmed."""
    gone, stays = await node.published(), await node.published()
    node.forget_pod(gone)
    own, other = node.authority.ca.der, TestCA("another").der
    await node.authority.trust(own, other)
    await _hold(node, [stays], own, other)
    await until(lambda: not node.volume_dir(gone).exists(), "removed")
    await _confirmed(node)


@pytest.mark.root
async def test_a_quarantined_volume_is_waited_for(node: Node) -> None:
    """Its root.crt can't be looked after until the kubelet's next look, which comes within 90 s: then it is, and is confirmed."""
    pod = FakePod()
    request = await node.published(pod)
    await node.driver.kill()
    (node.volume_dir(request) / "record.json").write_bytes(b"{")
    own, other = node.authority.ca.der, TestCA("another").der
    await node.authority.trust(own, other)
    await node.driver.start()
    await node.watched()
    bystander = await node.published()
    assert _roots(node, bystander) == [own, other]
    assert node.authority.confirmed_of() < _generation(node)
    await node.publish(node.kubelet.publish_request(pod))
    await until(partial(_holds_all, node, request, [own, other]), "adopted")
    await _confirmed(node)


def _holds_all(node: Node, request: Request, roots: list[bytes]) -> bool:
    return _roots(node, request) == roots
