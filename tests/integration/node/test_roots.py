"""Roots reach all volumes from any replica, and the driver acknowledges sets that all volumes contain."""

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
from tests.support.scripted_authority import TestCA, response_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MS_RDONLY, _MS_REMOUNT = 1, 32


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def own_roots(node: Node) -> AsyncIterator[None]:
    await node.watched()
    yield
    node.authority.acknowledgement_gate = None
    for name in [name for name in node.authority.sets if name != DEFAULT_ISSUER]:
        del node.authority.sets[name]
    await node.authority.trust(node.authority.ca.der)


def _roots(node: Node, request: Request) -> list[bytes]:
    return [root.public_bytes(Encoding.DER) for root in node.shown(request).roots]


def _generation(node: Node, name: str = DEFAULT_ISSUER) -> int:
    return node.authority.sets[name].generation


async def _wait_for_roots(node: Node, requests: Sequence[Request], *roots: bytes) -> None:
    await until(lambda: all(_roots(node, request) == list(roots) for request in requests), "the roots")


async def _wait_for_acknowledgement(node: Node, name: str = DEFAULT_ISSUER) -> None:
    await until(lambda: node.authority.acknowledged_generation(name) == _generation(node, name), "the acknowledgement")


async def test_root_crt_contains_the_roots_of_issuer_and_federations(node: Node) -> None:
    partner, later, own = TestCA("partner"), TestCA("later"), node.authority.ca.der
    await node.authority.trust(partner.der, name="partner")
    plain, federated = await node.published(), await node.published(attributes={"federations": "partner"})
    assert _roots(node, plain) == [own]
    assert _roots(node, federated) == [own, partner.der]
    state = node.state(plain)
    await node.authority.trust(partner.der, later.der, name="partner")
    await _wait_for_roots(node, [federated], own, partner.der, later.der)
    await _wait_for_acknowledgement(node, "partner")
    assert node.state(plain) == state
    del node.authority.sets["partner"]
    await node.authority.send_bundle()
    await _wait_for_roots(node, [federated], own)
    assert node.script.calls == 2


async def test_newer_set_of_a_response_reaches_all_volumes(node: Node) -> None:
    own, other = node.authority.ca.der, TestCA("ahead").der
    before = await node.published()
    ahead = _generation(node) + 1
    node.script.tamper = lambda answer: response_of(answer.chain, [own, other], ahead)
    first = await node.published()
    assert _roots(node, first) == [own, other]
    await _wait_for_roots(node, [before], own, other)
    node.authority.policy = "another"
    await node.authority.send_bundle()
    await node.authority.trust(own, TestCA("same generation").der)
    node.script.tamper = lambda answer: answer
    assert _roots(node, await node.published()) == [own, other]
    assert _roots(node, before) == _roots(node, first) == [own, other]


async def test_older_set_of_a_response_is_ignored(node: Node) -> None:
    own, other = node.authority.ca.der, TestCA("newest").der
    waits = await node.published()
    await node.authority.trust(own, other)
    await _wait_for_roots(node, [waits], own, other)
    node.script.tamper = lambda answer: response_of(answer.chain, [own], _generation(node) - 1)
    assert _roots(node, await node.published()) == [own, other]


async def test_roots_that_change_during_publish_calls_reach_all_volumes(node: Node) -> None:
    own, requests = node.authority.ca.der, [node.request() for _ in range(20)]
    publishing = asyncio.gather(*(node.publish(request) for request in requests))
    several = [TestCA(f"number {number}").der for number in range(10)]
    for each in several:
        await node.authority.trust(own, each)
        await asyncio.sleep(0)
    await publishing
    assert all(own in _roots(node, request) for request in requests)
    await _wait_for_roots(node, requests, own, several[-1])
    await _wait_for_acknowledgement(node)


@pytest.mark.root
async def test_failing_volume_does_not_delay_others(node: Node) -> None:
    requests = [node.request(FakePod(name=f"shop-{number}")) for number in range(50)]
    await asyncio.gather(*(node.publish(request) for request in requests))
    await _wait_for_acknowledgement(node)
    own, other, bad = node.authority.ca.der, TestCA("another").der, requests[17]
    directory = str(node.volume_dir(bad))
    syscalls.mount(None, directory, None, _MS_REMOUNT | _MS_RDONLY)
    try:
        await node.authority.trust(own, other)
        await _wait_for_roots(node, [request for request in requests if request is not bad], own, other)
        await until(lambda: node.metric("certmount_node_volumes_roots_behind") == 1, "the failure")
        assert _roots(node, bad) == [own]
        await until(lambda: len(node.driver.events("root certificate update failed")) > 1, "a retry")
        assert node.authority.acknowledged_generation() < _generation(node)
    finally:
        syscalls.mount(None, directory, None, _MS_REMOUNT)
    await _wait_for_roots(node, requests, own, other)
    await _wait_for_acknowledgement(node)
    await until(lambda: node.metric("certmount_node_volumes_roots_behind") == 0, "the metric")


async def test_driver_killed_before_the_acknowledgement(node: Node) -> None:
    request, own, other = await node.published(), node.authority.ca.der, TestCA("another").der
    node.authority.acknowledgement_gate = asyncio.Event()
    await node.authority.trust(own, other)
    await _wait_for_roots(node, [request], own, other)
    state = node.state(request)
    await node.driver.kill()
    node.authority.acknowledgement_gate.set()
    node.authority.acknowledged.clear()
    await node.driver.start()
    await _wait_for_acknowledgement(node)
    assert node.state(request) == state


async def test_roots_that_changed_while_the_driver_was_stopped(node: Node) -> None:
    partner, own, other = TestCA("partner").der, node.authority.ca.der, TestCA("another").der
    await node.authority.trust(partner, name="partner")
    request = await node.published(attributes={"federations": "partner"})
    await node.driver.kill()
    await node.authority.stop()
    node.authority.sets[DEFAULT_ISSUER] = RootSet((own, other), _generation(node) + 1)
    await node.driver.start()
    assert _roots(node, request) == [own, partner]
    await node.authority.start()
    await _wait_for_roots(node, [request], own, other, partner)
    await _wait_for_acknowledgement(node)


async def test_root_crt_is_never_empty(node: Node) -> None:
    """If the authority does not know any of the volume's sets, the files stay."""
    request, own = await node.published(), node.authority.sets[DEFAULT_ISSUER]
    state = node.state(request)
    await node.authority.trust(TestCA("another").der, name="partner")
    del node.authority.sets[DEFAULT_ISSUER]
    await node.authority.send_bundle()
    await _wait_for_acknowledgement(node, "partner")
    assert node.state(request) == state
    node.authority.sets[DEFAULT_ISSUER] = own


async def test_deleted_pod_does_not_delay_the_acknowledgement(node: Node) -> None:
    gone, stays = await node.published(), await node.published()
    node.forget_pod(gone)
    own, other = node.authority.ca.der, TestCA("another").der
    await node.authority.trust(own, other)
    await _wait_for_roots(node, [stays], own, other)
    await until(lambda: not node.volume_dir(gone).exists(), "removed")
    await _wait_for_acknowledgement(node)


@pytest.mark.root
async def test_quarantined_volume_delays_the_acknowledgement(node: Node) -> None:
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
    assert node.authority.acknowledged_generation() < _generation(node)
    await node.publish(node.kubelet.publish_request(pod))
    await until(partial(_holds_all, node, request, [own, other]), "adopted")
    await _wait_for_acknowledgement(node)


def _holds_all(node: Node, request: Request, roots: list[bytes]) -> bool:
    return _roots(node, request) == roots
