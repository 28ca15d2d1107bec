"""The first publish creates a complete volume or nothing. A republish of a healthy volume does no I/O."""

from __future__ import annotations

import asyncio
import json
import stat
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from csi_driver import POD_AUDIENCE
from csi_driver._proto import csi_pb2, csi_pb2_grpc
from tests.integration.node.world import FILES, Node, failure_of
from tests.support.kubelet import FakePod
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_STEP_S = 0.0003  # A publish takes some milliseconds. Timeouts that differ by this step end it in all of its parts.
_TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"


async def test_published_volume_has_files_for_the_requested_names(node: Node) -> None:
    attributes = {"name": "shop.web.svc", "dns-names": "a.example.com,*.b.example.com", "ip-sans": "10.1.2.3"}
    request = await node.published(FakePod("web", "shop-0", "shop"), attributes)
    shown = node.shown(request)
    names = {"shop.web.svc", "a.example.com", "*.b.example.com", "10.1.2.3", "spiffe://cluster.local/ns/web/sa/shop"}
    assert set(shown.names) == names
    assert [root.subject for root in shown.roots] == [node.authority.ca.certificate.subject]
    shown.leaf.verify_directly_issued_by(shown.roots[0])
    assert len(node.script.issued) == 1


async def test_certificate_without_spiffe_id(node: Node) -> None:
    attributes = {"uri-sans": "https://shop.example/1", "spiffe": "false"}
    request = await node.published(FakePod("web", "shop-1", "shop"), attributes)
    assert set(node.shown(request).names) == {"https://shop.example/1"}


async def test_duration_reaches_the_authority(node: Node) -> None:
    node.script.lifetime = timedelta(hours=3)
    for attributes, hours in (({"duration": "1h30m"}, 1.5), ({}, 3.0)):
        leaf = node.shown(await node.published(attributes=attributes)).leaf
        left = leaf.not_valid_after_utc - datetime.now(UTC)
        assert abs(left - timedelta(hours=hours)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    "key_type, kind, bits",
    [
        ("EC-P256", ec.EllipticCurvePublicKey, 256),
        ("EC-P384", ec.EllipticCurvePublicKey, 384),
        ("RSA-2048", rsa.RSAPublicKey, 2048),
        ("RSA-3072", rsa.RSAPublicKey, 3072),
        ("RSA-4096", rsa.RSAPublicKey, 4096),
        ("Ed25519", ed25519.Ed25519PublicKey, None),
    ],
)
async def test_key_type_attribute_decides_the_key(node: Node, key_type: str, kind: type, bits: int | None) -> None:
    key = node.shown(await node.published(attributes={"key-type": key_type})).leaf.public_key()
    assert isinstance(key, kind)
    assert getattr(key, "key_size", None) == bits


async def test_key_is_readable_for_all_users_without_a_group(node: Node) -> None:
    request = await node.published()
    modes = {name: stat.S_IMODE(node.target(request, name).stat().st_mode) for name in FILES}
    assert modes == dict.fromkeys(FILES, 0o444)


@pytest.mark.root
@pytest.mark.parametrize(
    "attribute, fs_group, expected",
    [("", "2000", 2000), ("3000", "", 3000), ("3000", "2000", 3000)],
    ids=["fsGroup", "attribute", "attribute-wins"],
)
async def test_only_the_group_reads_the_key(node: Node, attribute: str, fs_group: str, expected: int) -> None:
    node.script.renew_after = timedelta(seconds=0.1)
    request = await node.published(attributes={"fs-group": attribute} if attribute else {}, fs_group=fs_group)
    node.script.renew_after = None
    first = node.shown(request).serial

    def rights() -> dict[str, tuple[int, int, int]]:
        found = {name: node.target(request, name).stat() for name in FILES}
        return {name: (stat.S_IMODE(each.st_mode), each.st_uid, each.st_gid) for name, each in found.items()}

    private, public = (0o440, 0, expected), (0o444, 0, 0)
    expected_rights = dict.fromkeys(FILES, public) | {"site.key": private, "site.pem": private}
    assert rights() == expected_rights
    await node.restart()
    await node.publish(request)
    await until(lambda: node.shown(request).serial != first, "a renewal")
    assert rights() == expected_rights


@pytest.mark.root
async def test_target_is_read_only(node: Node) -> None:
    request = await node.published()
    target = node.target(request)
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").touch()
    with pytest.raises(OSError, match="Read-only"):
        (target / "site.crt").unlink()
    (bind,) = node.mounts(target)
    assert {"ro", "nosuid", "nodev", "noexec"} <= bind.options
    own, other = (node.mounts(node.volume_dir(each))[0] for each in (request, await node.published()))
    assert own.fs_type == "tmpfs"
    assert own.device != other.device
    assert stat.S_IMODE(node.volume_dir(request).stat().st_mode) == 0o700


@pytest.mark.parametrize("in_secrets", [False, True], ids=["volume_context", "secrets"])
async def test_token_is_read_from_volume_context_or_with_precedence_from_secrets(node: Node, in_secrets: bool) -> None:
    """It depends on the CSIDriver object (KEP-5538). A key in volume_context can be an attribute of the pod's author."""
    pod = FakePod()
    token, other = pod.token(), pod.token(jti="other")
    request = node.request(pod, token=token, tokens_in_secrets=in_secrets)
    if in_secrets:
        request.volume_context[_TOKENS] = json.dumps({POD_AUDIENCE: {"token": other}})
    await node.publish(request)
    assert node.script.tokens == [token]


async def test_republish_of_a_healthy_volume_does_no_io(node: Node) -> None:
    """The kubelet repeats the call all the time, with new tokens."""
    pod = FakePod()
    request = await node.published(pod)
    before, calls = node.state(request), node.script.calls
    for _ in range(5):
        await node.publish(node.kubelet.publish_request(pod))
    await node.authority.stop()
    await node.publish(node.kubelet.publish_request(pod))
    assert node.state(request) == before
    assert node.script.calls == calls == 1


@pytest.mark.root
async def test_mounts_do_not_stack(node: Node) -> None:
    request = await node.published()
    for _ in range(3):
        await asyncio.gather(*(node.publish(request) for _ in range(5)))
        await node.restart()
    await node.publish(request)
    assert len(node.mounts(request.target_path)) == 1
    assert len(node.mounts(node.volume_dir(request))) == 1
    assert node.script.calls == 1


@pytest.mark.root
async def test_republish_restores_a_removed_mount(node: Node) -> None:
    request = await node.published()
    before = node.shown(request)
    for remove in (False, True):
        node.unmount(request)
        if remove:
            node.target(request).rmdir()
        await node.publish(request)
        assert node.shown(request) == before
    assert node.script.calls == 1


async def test_second_target_shows_the_same_certificate(node: Node) -> None:
    pod = FakePod()
    first = await node.published(pod)
    second = node.request(pod)
    second.target_path = str(node.kubelet.target(pod, "again"))
    await node.publish(second)
    assert node.shown(second) == node.shown(first)
    await node.unpublish(first)
    assert not node.target(first).exists()
    assert node.shown(second).names
    await node.restart()
    assert node.shown(second).names
    await node.unpublish(second)
    node.assert_nothing_of(second)
    assert node.script.calls == 1


async def test_seventy_volumes_are_published_concurrently(node: Node) -> None:
    requests = [node.request(FakePod(name=f"shop-{number}")) for number in range(70)]
    await asyncio.gather(*(node.publish(request, timeout=60.0) for request in requests))
    assert len({node.shown(request).serial for request in requests}) == 70
    assert len({node.shown(request).key for request in requests}) == 70
    assert node.script.calls == 70


async def test_call_that_times_out_at_the_authority_leaves_nothing(node: Node) -> None:
    node.script.delay_s = 5.0
    request = node.request()
    failure = await failure_of(node.publish(request, timeout=0.5))
    assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not node.volume_dir(request).exists(), "the tmpfs is removed")
    node.assert_nothing_of(request)
    node.script.delay_s = 0.0
    await node.publish(request)
    assert node.shown(request).names


@pytest.mark.parametrize("deleted", [False, True], ids=["retried", "pod-deleted"])
async def test_call_that_times_out_anywhere_is_repeatable(node: Node, deleted: bool) -> None:
    """The pod can be deleted while its volume is created. The next call finds a complete volume or creates one."""
    cut = 0
    for number in range(1, 61, 1 + deleted):
        request = node.request()
        try:
            await node.publish(request, timeout=number * _STEP_S)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            cut += 1
        if not deleted:
            await node.publish(request)
            assert node.shown(request).names
        await node.unpublish(request)
        node.assert_nothing_of(request)
    assert cut, "no call timed out, so the test proves nothing"


async def test_stats_are_those_of_the_volume(node: Node) -> None:
    request = await node.published()
    stats_request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=request.volume_id, volume_path=request.target_path)
    answer = await node.stub.NodeGetVolumeStats(stats_request)
    usage = {entry.unit: entry for entry in answer.usage}
    assert set(usage) == {csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES}
    for entry in usage.values():
        assert 0 < entry.used < entry.total
        assert 0 < entry.available <= entry.total - entry.used
    if node.real_mounts:
        assert usage[csi_pb2.VolumeUsage.BYTES].total == 1 << 20
    stats_request.volume_path = str(node.target(request).parent)
    assert (await failure_of(node.stub.NodeGetVolumeStats(stats_request))).code is grpc.StatusCode.NOT_FOUND


async def test_identity_node_info_and_capabilities(node: Node) -> None:
    identity: csi_pb2_grpc.IdentityAsyncStub = csi_pb2_grpc.IdentityStub(node.channel)
    info = await identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), wait_for_ready=True)
    assert info.name == "csi.certmount.dev"
    assert info.vendor_version
    assert (await identity.Probe(csi_pb2.ProbeRequest())).ready.value
    assert (await node.stub.NodeGetInfo(csi_pb2.NodeGetInfoRequest())).node_id == "node1"
    capabilities = (await node.stub.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest())).capabilities
    rpc = csi_pb2.NodeServiceCapability.RPC
    found = {each.rpc.type for each in capabilities}
    assert found == {rpc.VOLUME_MOUNT_GROUP, rpc.GET_VOLUME_STATS, rpc.GET_VOLUME_HEALTH, rpc.GET_STORAGE_HEALTH}
    stage: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = node.channel.unary_unary("/csi.v1.Node/NodeStageVolume")
    assert (await failure_of(stage(b""))).code is grpc.StatusCode.UNIMPLEMENTED


async def test_two_volumes_of_one_pod_have_two_certificates(node: Node) -> None:
    pod = FakePod()
    first = await node.published(pod, {"name": "first.example.com"})
    second = node.request(pod, {"name": "second.example.com"}, volume_id="csi-second")
    second.target_path = str(node.kubelet.target(pod, "second"))
    await node.publish(second)
    shown = [node.shown(request) for request in (first, second)]
    assert ["first.example.com" in each.names for each in shown] == [True, False]
    await node.unpublish(first)
    assert node.shown(second).key == shown[1].key
