"""Volumes are renewed in place, keep their files while renewals fail, and recover without help."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from csi_driver._proto.csi_pb2 import DEGRADED
from csi_driver.core.certificates.keys import key_type_of
from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.world import Node, Request, Shown, make_due, running_node
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import TestCA, response_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOON = timedelta(seconds=0.3)
ISSUER_UNAVAILABLE = CertmountError(Reason.ISSUER_UNAVAILABLE, "the issuer is unavailable")


def _has_root(node: Node, request: Request, ca: TestCA) -> bool:
    return ca.certificate in node.shown(request).roots


async def _unhealthy(node: Node, reason: str) -> None:
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason=reason), f"a failed renewal: {reason}")


async def _renewed(node: Node, request: Request, before: Shown) -> None:
    await until(lambda: node.shown(request).serial != before.serial, "the renewal")


async def _recovered(node: Node, request: Request, before: Shown) -> None:
    await _renewed(node, request, before)
    assert await node.health(request) == []


async def test_renewal_replaces_the_files_in_the_mount_and_readers_see_one_complete_generation(node: Node) -> None:
    """``shown`` checks that all files of a generation exist and match."""
    node.script.renew_after = SOON
    request = await node.published()
    mounts, seen = node.mounts(node.kubelet.root), dict[bytes, int]()

    def read() -> bool:
        seen.update((shown.key, shown.serial) for shown in (node.shown(request) for _ in range(20)))
        return len(seen) == 4

    await until(read, "three renewals")
    assert len(set(seen.values())) == 4
    assert node.mounts(node.kubelet.root) == mounts
    assert await node.health(request) == []

    def renewed() -> list[Any]:
        return [line for line in node.driver.events("certificate renewed") if line["volume"] == request.volume_id]

    await until(lambda: len(renewed()) >= 3, "the log lines, each of which is written after the files")
    # They do not contain the method of a kubelet call.
    assert not [line for line in renewed() if "method" in line]


@pytest.mark.parametrize("reuse", ["true", "false"])
async def test_renewals_keep_the_key_on_request(node: Node, reuse: str) -> None:
    """Also after a restart of the driver, which has it in its own copy."""
    node.script.renew_after = SOON
    pod, attributes = FakePod(), {"reuse-key": reuse}
    request = await node.published(pod, attributes)
    before = node.shown(request)
    await node.restart()
    await node.publish(node.kubelet.publish_request(pod, attributes))
    await until(lambda: node.shown(request).serial != before.serial, "a renewal")
    assert (node.shown(request).key == before.key) == (reuse == "true")


async def test_record_contains_the_renewal_time(node: Node) -> None:
    """renew-before counts from the expiry, renew-after of the issuer from now. By default the first renewal is early."""
    for attributes, renew_after, earliest, latest in (
        ({"duration": "10h", "renew-before": "4h"}, None, 5.6, 6.4),
        ({"duration": "9h"}, None, 2.7, 6.3),
        ({"duration": "9h"}, timedelta(hours=2), 1.8, 2.2),
    ):
        node.script.renew_after = renew_after
        record = node.record(await node.published(attributes=attributes))
        assert earliest <= (record["renew_at"] - record["issued_at"]) / 3600 <= latest


async def test_renewal_uses_the_newest_token(node: Node) -> None:
    pod = FakePod()
    node.script.renew_after = timedelta(seconds=1)
    request = await node.published(pod)
    newest = pod.token(exp=int(time.time()) + 7200)
    await node.publish(node.kubelet.publish_request(pod, token=newest))
    await until(lambda: node.script.calls > 1, "a renewal")
    assert node.script.tokens[1] == newest
    # If the kubelet cannot renew the token, it sends the old one again. The driver keeps the newer one.
    await node.publish(node.kubelet.publish_request(pod, token=pod.token(exp=int(time.time()) + 60)))
    calls = node.script.calls
    await until(lambda: node.script.calls > calls, "another renewal")
    assert node.script.tokens[-1] == newest
    assert node.shown(request).names


async def test_failed_renewals_are_retried_with_backoff(node: Node) -> None:
    node.script.renew_after = SOON
    request = await node.published()
    before, logged = node.shown(request), len(node.driver.events("renewal failed"))
    node.script.failure = ISSUER_UNAVAILABLE
    await until(lambda: len(node.driver.events("renewal failed")) >= logged + 2, "two failed renewals")
    failures = node.driver.events("renewal failed")[logged:]
    assert [line["attempt"] for line in failures[:2]] == [1, 2]
    assert {line["reason"] for line in failures} == {"IssuerUnavailable"}
    for line, seconds in zip(failures, (1, 2), strict=False):
        assert 0.7 * seconds <= line["retry_in_s"] <= 1.3 * seconds
    assert node.shown(request) == before
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "IssuerUnavailable")
    assert "web/shop" in message
    assert "the issuer is unavailable" in message
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="IssuerUnavailable") == 1, "the metric")
    node.script.failure = node.script.renew_after = None
    await _recovered(node, request, before)
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="IssuerUnavailable") == 0, "the metric")


async def test_record_that_cannot_be_written_does_not_repeat_the_renewal(node: Node) -> None:
    """The certificate is in place, so the next renewal is at its usual time, and the volume is healthy."""
    node.script.renew_after = timedelta(seconds=1)
    request = await node.published()
    before, logged = node.shown(request), len(node.driver.events("renewal failed"))
    record = node.volume_dir(request) / "record.json"
    text = record.read_bytes()
    record.unlink()
    (record / "full").mkdir(parents=True)  # a directory cannot be replaced by a file
    node.script.renew_after = None
    await until(lambda: node.driver.events("record not written"), "a record that is not written")
    renewed = node.shown(request)
    assert renewed.serial != before.serial
    assert node.driver.events("record not written")[-1]["reason"] == "MountFailed"
    assert len(node.driver.events("renewal failed")) == logged
    assert await node.health(request) == []
    (record / "full").rmdir()
    record.rmdir()
    record.write_bytes(text)
    assert node.shown(request) == renewed


async def test_volume_recovers_after_an_outage_of_the_authority(node: Node) -> None:
    node.script.renew_after = SOON
    request = await node.published()
    before = node.shown(request)
    await node.authority.stop()
    await _unhealthy(node, "AuthorityUnavailable")
    assert node.shown(request) == before
    ((status, reason, _),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "AuthorityUnavailable")
    await node.authority.start()
    await _recovered(node, request, before)


async def test_expired_certificate_stays_in_the_volume(node: Node) -> None:
    node.script.lifetime = timedelta(seconds=2)
    request = await node.published()
    before = node.shown(request)
    node.script.failure = ISSUER_UNAVAILABLE
    await until(lambda: datetime.now(UTC) > before.leaf.not_valid_after_utc, "expiry")
    await node.publish(request)
    assert node.shown(request) == before
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (DEGRADED, "CertificateExpired")
    assert "the issuer is unavailable" in message
    node.script.failure, node.script.lifetime = None, timedelta(hours=1)
    await _recovered(node, request, before)


async def test_expired_token_is_not_sent(node: Node) -> None:
    pod = FakePod()
    node.script.renew_after = timedelta(seconds=2.5)
    request = await node.published(pod, token=pod.token(exp=int(time.time()) + 2))
    before = node.shown(request)
    node.script.renew_after = None
    await _unhealthy(node, "TokenExpired")
    assert [reason for _, reason, _ in await node.health(request)] == ["TokenExpired"]
    assert node.script.calls == 1
    await node.publish(node.kubelet.publish_request(pod))
    await _renewed(node, request, before)


async def test_new_roots_reach_every_volume_without_new_certificates(node: Node) -> None:
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
    await until(lambda: all(len(node.shown(request).roots) == 1 for request in requests), "the first roots again")
    states = [node.state(request) for request in requests]
    await node.authority.stop()
    await node.authority.start()
    await node.watched()
    await node.published()
    assert [node.state(request) for request in requests] == states, "unchanged roots cause no write"


async def test_invalid_roots_change_nothing(node: Node) -> None:
    await node.watched()
    request = await node.published()
    state = node.state(request)
    await node.authority.trust(b"not a certificate")
    await until(
        lambda: any(line["reason"] == "InvalidResponse" for line in node.driver.events("trust stream failed")), "error"
    )
    assert node.state(request) == state
    other = TestCA("another root")
    await node.authority.trust(node.authority.ca.der, other.der)
    await until(lambda: other.certificate in node.shown(request).roots, "the valid roots")
    await node.authority.trust(node.authority.ca.der)


async def test_new_root_file_is_used_immediately(node: Node) -> None:
    """A CA rotation changes the file. The next call trusts it, calls in progress succeed, and renewals continue."""
    await node.watched()
    node.script.renew_after = timedelta(seconds=0.1)
    renewed = await node.published()
    before = node.shown(renewed)
    node.script.delay_s = 1.5
    await until(lambda: node.script.calls > 1, "a renewal in progress")
    pem, other = node.authority.root_file.read_bytes(), TestCA("another root")
    node.authority.root_file.write_bytes(other.pem + pem)
    try:
        node.script.delay_s = 0.0
        began = time.monotonic()
        await node.published()
        assert time.monotonic() - began < 5.0
        await _renewed(node, renewed, before)
        await node.authority.trust(node.authority.ca.der, other.der)
        await until(partial(_has_root, node, renewed, other), "roots")
        calls = node.script.calls
        await until(lambda: node.script.calls > calls + 1, "further renewals")
    finally:
        node.authority.root_file.write_bytes(pem)
        await node.authority.trust(node.authority.ca.der)


async def test_volume_of_a_deleted_pod_is_removed_and_not_renewed(node: Node) -> None:
    node.script.renew_after = timedelta(seconds=1)
    request = await node.published()
    node.forget_pod(request)
    await until(lambda: not node.volume_dir(request).exists(), "removal")
    node.assert_nothing_of(request)
    assert node.script.calls == 1


@pytest_asyncio.fixture(loop_scope="module")
async def hanging(node: Node) -> AsyncIterator[Request]:
    """Yield a volume whose renewal waits for the authority until the gate is set."""
    node.script.renew_after = SOON
    request = await node.published(FakePod(name="hanging"))
    gate = node.script.gate = asyncio.Event()
    await until(lambda: node.script.calls > 1, "a renewal in progress")
    yield request
    gate.set()


async def test_republish_does_not_wait_for_a_renewal(node: Node, hanging: Request) -> None:
    await node.publish(hanging)
    assert node.shown(hanging).names


async def test_unpublish_does_not_wait_for_a_renewal_which_then_writes_nothing(node: Node, hanging: Request) -> None:
    gate, node.script.gate = node.script.gate, None
    assert gate
    other = await node.published()
    first = node.shown(other)
    await node.unpublish(hanging)
    node.assert_nothing_of(hanging)
    await _renewed(node, other, first)
    gate.set()
    calls = node.script.calls
    await until(lambda: node.script.calls >= calls + 3, "renewals of the other volume")
    node.assert_nothing_of(hanging)


async def test_unpublish_of_one_target_does_not_stop_the_renewal_of_another(node: Node, hanging: Request) -> None:
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
    await _renewed(node, hanging, before)


async def test_new_roots_do_not_wait_for_a_renewal(node: Node, hanging: Request) -> None:
    await node.watched()
    node.script.gate = node.script.renew_after = None
    requests, root = (hanging, await node.published()), TestCA("another root")
    await node.authority.trust(node.authority.ca.der, root.der)
    await until(lambda: all(_has_root(node, each, root) for each in requests), "the other root")
    await node.authority.trust(node.authority.ca.der)


async def test_roots_that_change_during_a_request_are_not_lost(node: Node, hanging: Request) -> None:
    """A response can contain older roots than the trust bundle, for a first publish and for a renewal."""
    await node.watched()
    before, root, old = node.shown(hanging), TestCA("another root"), node.authority.ca.der
    node.script.tamper = lambda answer: response_of(answer.chain, [old])
    first = node.request()
    publishing = asyncio.ensure_future(node.publish(first))
    await until(lambda: node.script.calls > 2, "a publish in progress")
    await node.authority.trust(old, root.der)
    await until(lambda: _has_root(node, hanging, root), "the other root")
    assert node.script.gate
    node.script.gate.set()
    await publishing
    assert _has_root(node, first, root)
    await _renewed(node, hanging, before)
    assert _has_root(node, hanging, root)
    await node.authority.trust(old)


async def test_default_key_type_is_that_of_the_first_publish() -> None:
    """A driver with another default keeps the key types of its volumes, and a pod can set its own."""
    async with running_node(options=["--default-key-type=Ed25519"]) as node:
        by_default, own = await node.published(), await node.published(attributes={"key-type": "EC-P384"})
        before = node.shown(by_default)
        assert [_key_type(node, request) for request in (by_default, own)] == ["Ed25519", "EC-P384"]
        node.driver.options = ()
        await make_due(node, by_default)
        await node.driver.start()
        await node.publish(by_default)
        await until(lambda: node.shown(by_default).serial != before.serial, "a renewal")
        assert _key_type(node, by_default) == "Ed25519"
        assert _key_type(node, await node.published()) == "EC-P256"


async def test_volume_without_a_record_keeps_the_default_key_type() -> None:
    async with running_node(options=["--default-key-type=Ed25519"]) as node:
        pod = FakePod()
        request = await node.published(pod)
        before = node.shown(request)
        await node.driver.kill()
        (node.volume_dir(request) / "record.json").unlink()
        await node.driver.start()
        await node.publish(node.kubelet.publish_request(pod))
        await make_due(node, request)
        await node.driver.start()
        await node.publish(node.kubelet.publish_request(pod))
        await _renewed(node, request, before)
        assert _key_type(node, request) == "Ed25519"


def _key_type(node: Node, request: Request) -> str:
    kind = key_type_of(node.shown(request).chain[0].public_key())
    assert kind is not None
    return kind.value
