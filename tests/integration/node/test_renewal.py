"""A live volume is renewed in place, keeps what it has while that fails, and heals by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
import pytest_asyncio

from csi_driver._proto.csi_pb2 import DEGRADED
from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.world import Node, Request
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import TestCA, answer_of, refused, roots_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOON = timedelta(seconds=0.3)


def _has_root(node: Node, request: Request, ca: TestCA) -> bool:
    return ca.certificate in node.shown(request).roots


async def test_rotation_in_place(node: Node) -> None:
    """Key and certificate are exchanged, again and again, in the mount that the pod has had all the time."""
    node.script.renew_after = SOON
    request = await node.published()
    mounts = node.mounts(node.kubelet.root)
    seen = {node.shown(request).key: node.shown(request).serial}
    for _ in range(3):
        await until(lambda: node.shown(request).key not in seen, "another key")
        shown = node.shown(request)
        seen[shown.key] = shown.serial
    assert len(set(seen.values())) == 4
    assert node.mounts(node.kubelet.root) == mounts
    assert await node.health(request) == []
    # In the log a renewal is its pod's, and no call of the kubelet.
    renewed = [line for line in node.driver.events("certificate renewed") if line["volume"] == request.volume_id]
    assert len(renewed) >= 3
    assert not [line for line in renewed if "method" in line]


async def test_a_reader_never_sees_a_torn_generation(node: Node) -> None:
    """While it rotates, what is read through one generation's folder is there and fits together (``shown`` checks it)."""
    node.script.renew_after = SOON
    request = await node.published()
    generations: set[str] = set()

    def read() -> bool:
        generations.update(node.shown(request).generation for _ in range(20))
        return len(generations) == 3

    await until(read, "three generations")


async def test_the_issuers_hint_and_renew_before_set_the_moment(node: Node) -> None:
    """``renew-before`` counts from the end, an issuer's hint from now; the record holds what was decided.

    Without either, the first renewal is brought forward by chance: volumes that came together drift apart.
    """
    for attributes, hint, least, most in (
        ({"duration": "10h", "renew-before": "4h"}, None, 5.6, 6.4),
        ({"duration": "9h"}, None, 2.7, 6.3),
        ({"duration": "9h"}, timedelta(hours=2), 1.8, 2.2),
    ):
        node.script.renew_after = hint
        record = node.record(await node.published(attributes=attributes))
        hours = (record["renew_at"] - record["issued_at"]) / 3600
        assert least <= hours <= most


async def test_the_newest_token_is_used(node: Node) -> None:
    """Each republish brings a token; a renewal shows the last one, never one that an earlier call brought."""
    pod = FakePod()
    node.script.renew_after = timedelta(seconds=1)
    request = await node.published(pod)
    newest = pod.token(exp=int(time.time()) + 7200)
    await node.publish(node.kubelet.publish_request(pod, token=newest))
    await until(lambda: node.script.calls > 1, "a renewal")
    assert node.script.tokens[1] == newest
    # Kubelet passes the old one again where it could not renew it: the newer one stays in use.
    await node.publish(node.kubelet.publish_request(pod, token=pod.token(exp=int(time.time()) + 60)))
    calls = node.script.calls
    await until(lambda: node.script.calls > calls, "another renewal")
    assert node.script.tokens[-1] == newest
    assert node.shown(request).names


async def test_failed_renewals_are_tried_again_and_heal(node: Node) -> None:
    """An issuer fails past a renewal: the pod is untouched, tries grow apart, health says why, and it heals by itself."""
    node.script.renew_after = SOON
    request = await node.published()
    before, logged = node.shown(request), len(node.driver.events("renewal failed"))
    node.script.failure = CertmountError(Reason.ISSUER_UNAVAILABLE, "the issuer is away")
    await until(lambda: len(node.driver.events("renewal failed")) >= logged + 2, "two failed renewals")
    tries = node.driver.events("renewal failed")[logged:]
    assert [line["attempt"] for line in tries[:2]] == [1, 2]
    assert {line["reason"] for line in tries} == {"IssuerUnavailable"}
    for line, seconds in zip(tries, (1, 2), strict=False):
        assert 0.7 * seconds <= line["retry_in_s"] <= 1.3 * seconds
    assert node.shown(request) == before
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "IssuerUnavailable")
    assert "web/shop" in message
    assert "the issuer is away" in message
    assert node.metric("certmount_node_volumes_unhealthy", reason="IssuerUnavailable") == 1
    node.script.failure = node.script.renew_after = None
    await until(lambda: node.shown(request).serial != before.serial, "healed")
    assert await node.health(request) == []
    assert node.metric("certmount_node_volumes_unhealthy", reason="IssuerUnavailable") == 0


async def test_an_outage_of_the_authority_heals(node: Node) -> None:
    """The authority is gone past a renewal: the pod is untouched, and is renewed soon after the authority's return."""
    node.script.renew_after = SOON
    request = await node.published()
    before = node.shown(request)
    await node.authority.stop()
    await until(
        lambda: node.metric("certmount_node_volumes_unhealthy", reason="AuthorityUnavailable"), "a failed renewal"
    )
    assert node.shown(request) == before
    ((status, reason, _),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "AuthorityUnavailable")
    await node.authority.start()
    await until(lambda: node.shown(request).serial != before.serial, "healed")
    assert await node.health(request) == []


async def test_a_refused_renewal_heals_when_the_policy_is_fixed(node: Node) -> None:
    """A refusal is tried again too; until then the old files stay, and health says which name and why."""
    node.script.renew_after = SOON
    request = await node.published(attributes={"name": "shop.example.com"})
    before = node.shown(request)
    node.script.failure = refused("shop.example.com")
    await until(lambda: node.script.calls > 2, "refused twice")
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "NameNotAllowed")
    assert "shop.example.com: no policy rule allows this name" in message
    assert node.shown(request) == before
    node.script.failure = node.script.renew_after = None
    await until(lambda: node.shown(request).serial != before.serial, "renewed")
    assert await node.health(request) == []


async def test_an_expired_certificate_stays_and_is_reported(node: Node) -> None:
    """Nothing is taken away from a pod; an expired certificate is an unhealthy volume that says so and is tried on."""
    node.script.life = timedelta(seconds=2)
    request = await node.published()
    before = node.shown(request)
    node.script.failure = CertmountError(Reason.ISSUER_UNAVAILABLE, "the issuer is away")
    await until(lambda: datetime.now(UTC) > before.leaf.not_valid_after_utc, "expiry")
    await node.publish(request)
    assert node.shown(request) == before
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "CertificateExpired")
    assert "the issuer is away" in message
    node.script.failure, node.script.life = None, timedelta(hours=1)
    await until(lambda: node.shown(request).serial != before.serial, "healed")
    assert await node.health(request) == []


async def test_an_expired_token_waits_for_the_next_one(node: Node) -> None:
    """A token that has run out is not sent; the republish that brings a new one brings the renewal at once."""
    pod = FakePod()
    node.script.renew_after = timedelta(seconds=2.5)
    request = await node.published(pod, token=pod.token(exp=int(time.time()) + 2))
    before = node.shown(request)
    node.script.renew_after = None
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="TokenExpired"), "a failed renewal")
    ((_, reason, _),) = await node.health(request)
    assert reason == "TokenExpired"
    assert node.script.calls == 1
    await node.publish(node.kubelet.publish_request(pod))
    await until(lambda: node.shown(request).serial != before.serial, "renewed")


async def test_new_roots_reach_every_volume_without_new_certificates(node: Node) -> None:
    """The authority's roots change: each root.crt follows within seconds, key and certificate stay."""
    await node.watched()
    requests = [await node.published() for _ in range(3)]
    before = [node.shown(request) for request in requests]
    other = TestCA("another root")
    await node.authority.trust(node.authority.ca.der, other.der)
    try:
        for request in requests:
            await until(partial(_has_root, node, request, other), "the other root")
        after = [node.shown(request) for request in requests]
        assert [(each.key, each.chain) for each in after] == [(each.key, each.chain) for each in before]
        assert node.script.calls == len(requests)
    finally:
        await node.authority.trust(node.authority.ca.der)
    await until(lambda: all(len(node.shown(request).roots) == 1 for request in requests), "back again")
    states = [node.state(request) for request in requests]
    await node.authority.stop()
    await node.authority.start()
    await node.watched()
    await node.published()
    assert [node.state(request) for request in requests] == states, "the same roots again are no reason to write"


async def test_roots_that_make_no_sense_change_nothing(node: Node) -> None:
    """What is no certificate is not handed to a pod, and later roots are taken again."""
    await node.watched()
    request = await node.published()
    state = node.state(request)
    await node.authority.trust(b"not a certificate")
    await until(
        lambda: any(line["reason"] == "InvalidResponse" for line in node.driver.events("roots not followed")), "seen"
    )
    assert node.state(request) == state
    other = TestCA("another root")
    await node.authority.trust(node.authority.ca.der, other.der)
    await until(lambda: other.certificate in node.shown(request).roots, "good roots after bad ones")
    await node.authority.trust(node.authority.ca.der)


async def test_another_root_file_is_used_at_once(node: Node) -> None:
    """The authority's CA is renewed, so the ConfigMap's file changes: the next call trusts it and waits for no other
    call; calls under way end well, their volumes rotate on, and roots are still followed.
    """
    await node.watched()
    node.script.renew_after = timedelta(seconds=0.1)
    renewed = await node.published()
    before = node.shown(renewed)
    node.script.delay_s = 1.5
    await until(lambda: node.script.calls > 1, "a renewal under way")
    pem, other = node.authority.root_file.read_bytes(), TestCA("another root")
    node.authority.root_file.write_bytes(other.pem + pem)
    try:
        node.script.delay_s = 0.0
        began = time.monotonic()
        await node.published()
        assert time.monotonic() - began < 5.0
        await until(lambda: node.shown(renewed).serial != before.serial, "the renewal that was under way")
        await node.authority.trust(node.authority.ca.der, other.der)
        await until(lambda: other.certificate in node.shown(renewed).roots, "roots")
        calls = node.script.calls
        await until(lambda: node.script.calls > calls + 1, "further renewals")
    finally:
        node.authority.root_file.write_bytes(pem)
        await node.authority.trust(node.authority.ca.der)


async def test_a_pod_that_is_gone_is_not_renewed(node: Node) -> None:
    """When its moment comes and the pod's folder is gone, the volume is dropped instead of renewed for ever."""
    node.script.renew_after = timedelta(seconds=1)
    request = await node.published()
    node.forget_pod(request)
    await until(lambda: not node.volume_dir(request).exists(), "dropped")
    node.assert_nothing_of(request)
    assert node.script.calls == 1


async def test_an_unpublished_volume_is_not_renewed(node: Node) -> None:
    """Unpublish ends the renewals, also one that is under way: what it brings is not written anywhere."""
    node.script.renew_after = timedelta(seconds=0.2)
    request = await node.published()
    node.script.delay_s = 0.3
    await until(lambda: node.script.calls > 1, "a renewal under way")
    await node.unpublish(request)
    node.assert_nothing_of(request)
    calls = node.script.calls
    other = await node.published()  # whose renewals show that the clock went on
    await until(lambda: node.script.calls >= calls + 3, "renewals of the other volume")
    node.assert_nothing_of(request)
    assert node.shown(other).names


async def test_a_wrong_answer_is_not_written(node: Node) -> None:
    """A renewal answered with another's certificate keeps the good one, and the next right answer is taken."""
    node.script.renew_after = SOON
    request = await node.published()
    before = node.shown(request)
    node.script.tamper = lambda answer: answer_of(roots_of(answer), roots_of(answer))
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="InvalidResponse"), "a failed renewal")
    assert node.shown(request) == before
    node.script.tamper, node.script.renew_after = (lambda answer: answer), None
    await until(lambda: node.shown(request).serial != before.serial, "healed")


@pytest_asyncio.fixture(loop_scope="module")
async def hanging(node: Node) -> AsyncIterator[Request]:
    """A live volume whose renewal is under way at an authority that does not answer until its gate is set."""
    node.script.renew_after = SOON
    request = await node.published(FakePod(name="hanging"))
    gate = node.script.gate = asyncio.Event()
    await until(lambda: node.script.calls > 1, "a renewal under way")
    yield request
    gate.set()


async def test_a_republish_does_not_wait_for_a_renewal(node: Node, hanging: Request) -> None:
    """The kubelet's look at a pod is answered at once, also while the volume's renewal hangs at the authority."""
    await node.publish(hanging)
    assert node.shown(hanging).names


async def test_an_unpublish_does_not_wait_for_a_renewal(node: Node, hanging: Request) -> None:
    """A pod ends at once, also while its volume's renewal hangs at the authority, and the clock goes on for others."""
    node.script.gate = None
    other = await node.published()
    first = node.shown(other).serial
    await node.unpublish(hanging)
    node.assert_nothing_of(hanging)
    await until(lambda: node.shown(other).serial != first, "the other volume's renewal")


async def test_a_target_that_goes_does_not_cost_the_other_its_renewal(node: Node, hanging: Request) -> None:
    """Of two targets one is unpublished while the renewal hangs: the volume is renewed all the same."""
    before, second = node.shown(hanging), node.kubelet.publish_request(FakePod())
    second.CopyFrom(hanging)
    second.target_path = str(node.target(hanging).parent.parent / "again" / "mount")
    node.target(second).parent.mkdir()
    await node.publish(second)
    await node.unpublish(second)
    assert not node.target(second).exists()
    assert node.shown(hanging) == before
    assert node.script.gate
    node.script.gate.set()
    await until(lambda: node.shown(hanging).serial != before.serial, "renewed")


async def test_new_roots_do_not_wait_for_a_renewal(node: Node, hanging: Request) -> None:
    """One volume's renewal hangs: its root.crt and the others' follow the authority at once."""
    await node.watched()
    node.script.gate = node.script.renew_after = None
    requests, root = (hanging, await node.published()), TestCA("another root")
    await node.authority.trust(node.authority.ca.der, root.der)
    await until(lambda: all(_has_root(node, each, root) for each in requests), "the other root")
    await node.authority.trust(node.authority.ca.der)


async def test_roots_that_change_during_a_call_are_not_lost(node: Node, hanging: Request) -> None:
    """An answer may carry the roots of before: those that arrived meanwhile win, for a first publish and for a renewal."""
    await node.watched()
    before, root, old = node.shown(hanging), TestCA("another root"), node.authority.ca.der
    node.script.tamper = lambda answer: answer_of(answer.chain, [old])
    first = node.request()
    publishing = asyncio.ensure_future(node.publish(first))
    await until(lambda: node.script.calls > 2, "a publish under way")
    await node.authority.trust(old, root.der)
    await until(lambda: _has_root(node, hanging, root), "the other root")
    assert node.script.gate
    node.script.gate.set()
    await publishing
    assert _has_root(node, first, root)
    await until(lambda: node.shown(hanging).serial != before.serial, "renewed")
    assert _has_root(node, hanging, root)
    await node.authority.trust(old)
