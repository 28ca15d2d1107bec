"""What the driver tells others about itself: registration, probes, metrics, the health of a volume."""

from __future__ import annotations

import re
from datetime import timedelta

import grpc
import pytest

from csi_driver._proto import csi_pb2
from tests.integration.node.world import Node, failure_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_kubelet_finds_the_driver(node: Node) -> None:
    """The registration names type, driver, versions and the socket where CSI is served."""
    info = await node.kubelet.register()
    assert (info.type, info.name) == ("CSIPlugin", "csi.certmount.dev")
    assert list(info.supported_versions) == ["1.0.0"]
    async with grpc.aio.insecure_channel(f"unix:{info.endpoint}") as channel:
        answer: grpc.aio.UnaryUnaryMultiCallable[bytes, csi_pb2.GetPluginInfoResponse] = channel.unary_unary(
            "/csi.v1.Identity/GetPluginInfo", response_deserializer=csi_pb2.GetPluginInfoResponse.FromString
        )
        assert (await answer(b"")).name == info.name


async def test_ready_once_registered(node: Node) -> None:
    """Not ready before the kubelet knows the driver, ready after, not ready with the kubelet's words when it failed."""
    await node.restart()
    status, text = node.driver.get("/readyz")
    assert (status, "the kubelet has not registered the driver yet" in text) == (503, True)
    await node.kubelet.register()
    assert node.driver.get("/readyz") == (200, "ok\n")
    await node.kubelet.register(error="plugin name is taken")
    status, text = node.driver.get("/readyz")
    assert (status, "plugin name is taken" in text) == (503, True)
    await node.kubelet.register()
    assert node.driver.get("/readyz") == (200, "ok\n")


async def test_the_registration_socket_is_made_anew(node: Node) -> None:
    """The kubelet notices a new socket only: each start makes one, and an end takes it away."""
    socket, kept = node.kubelet.registration_socket, node.kubelet.root / "kept.sock"
    await node.driver.kill()
    kept.hardlink_to(socket)  # so that the kernel can't give its inode to the new one
    await node.driver.start()
    await until(lambda: socket.exists() and not socket.samefile(kept), "a new socket")
    await node.driver.stop()
    assert not node.kubelet.registration_socket.exists()


async def test_not_ready_without_the_authoritys_root(node: Node) -> None:
    """Until the ConfigMap is there the driver waits, says what for, and refuses volumes with the same words; then it works."""
    pem = node.authority.root_file.read_bytes()
    for content, problem in ((None, "the authority's root is not there yet"), (b"x", "holds no certificate in PEM")):
        if content is None:
            node.authority.root_file.unlink()
        else:
            node.authority.root_file.write_bytes(content)
        await node.kubelet.register()
        status, text = node.driver.get("/readyz")
        assert (status, problem in text) == (503, True)
        request = node.request()
        failure = await failure_of(node.publish(request))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "RootCertificateMissing")
        assert problem in failure.text
        node.assert_nothing_of(request)
    node.authority.root_file.write_bytes(pem)
    assert node.driver.get("/readyz") == (200, "ok\n")
    await node.published()


async def test_not_ready_in_a_folder_that_is_no_kubelets(node: Node) -> None:
    """A wrong --kubelet-dir is told by the probe and the log in one clear line."""
    registry, away = node.kubelet.root / "plugins_registry", node.kubelet.root / "away"
    await node.kubelet.register()
    registry.rename(away)
    try:
        status, text = node.driver.get("/readyz")
    finally:
        away.rename(registry)
    assert status == 503
    assert "--kubelet-dir" in text
    assert "has no plugins_registry" in text


async def test_alive(node: Node) -> None:
    """The liveness probe passes also while the authority is away, and unknown paths are told so."""
    await node.authority.stop()
    assert node.driver.get("/healthz") == (200, "ok\n")
    assert node.driver.get("/")[0] == 404


async def test_metrics(node: Node) -> None:
    """Volumes, calls by method and reason, renewals and failures are counted under documented names."""
    calls = 'certmount_node_call_seconds_count{method="NodePublishVolume",reason="'

    def count(reason: str) -> float:
        _, page = node.driver.get("/metrics")
        found = re.search(re.escape(f'{calls}{reason}"}}') + r" (\S+)", page)
        return float(found[1]) if found else 0.0

    good, bad = count(""), count("InvalidRequest")
    renewals = node.metric("certmount_node_renewals_total")
    node.script.renew_after = timedelta(seconds=0.2)
    await node.published()
    await failure_of(node.publish(node.request(read_only=False)))
    # A call is counted when it has ended, and its answer may arrive before that.
    await until(lambda: (count("") - good, count("InvalidRequest") - bad) == (1, 1), "both calls are counted")
    assert node.metric("certmount_node_volumes") == 1
    await until(lambda: node.metric("certmount_node_renewals_total") > renewals, "a renewal is counted")
    assert node.metric("certmount_node_first_expiry_timestamp_seconds") > 0


async def test_a_healthy_volume_has_no_entries(node: Node) -> None:
    """Health is asked with or without the path; an unknown volume or path is NOT_FOUND."""
    request = await node.published()
    assert await node.health(request) == []
    question = csi_pb2.NodeGetVolumeHealthRequest(volume_id=request.volume_id)
    assert not (await node.stub.NodeGetVolumeHealth(question)).volume_health.health_statuses
    for unknown in (
        csi_pb2.NodeGetVolumeHealthRequest(volume_id="csi-unknown"),
        csi_pb2.NodeGetVolumeHealthRequest(volume_id=request.volume_id, volume_publish_path="/some/path"),
    ):
        failure = await failure_of(node.stub.NodeGetVolumeHealth(unknown))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "VolumeNotFound")
    failure = await failure_of(node.stub.NodeGetVolumeHealth(csi_pb2.NodeGetVolumeHealthRequest()))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
