"""Registration, probes, metrics and volume health."""

from __future__ import annotations

import re
from datetime import timedelta

import grpc
import pytest

from csi_driver._proto import csi_pb2
from tests.integration.node.world import Node, failure_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_registration_has_the_csi_socket(node: Node) -> None:
    """Type, name and versions too."""
    info = await node.kubelet.register()
    assert (info.type, info.name) == ("CSIPlugin", "csi.certmount.dev")
    assert list(info.supported_versions) == ["1.0.0"]
    async with grpc.aio.insecure_channel(f"unix:{info.endpoint}") as channel:
        answer: grpc.aio.UnaryUnaryMultiCallable[bytes, csi_pb2.GetPluginInfoResponse] = channel.unary_unary(
            "/csi.v1.Identity/GetPluginInfo", response_deserializer=csi_pb2.GetPluginInfoResponse.FromString
        )
        assert (await answer(b"")).name == info.name


async def test_driver_is_ready_after_its_registration(node: Node) -> None:
    """A failed registration shows the kubelet's error."""
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


async def test_each_start_creates_a_new_registration_socket(node: Node) -> None:
    """The kubelet detects only a new socket. A stop removes it."""
    socket, kept = node.kubelet.registration_socket, node.kubelet.root / "kept.sock"
    await node.driver.kill()
    kept.hardlink_to(socket)  # the new socket gets another inode
    await node.driver.start()
    await until(lambda: socket.exists() and not socket.samefile(kept), "a new socket")
    await node.driver.stop()
    assert not node.kubelet.registration_socket.exists()


async def test_driver_is_not_ready_without_the_authoritys_root(node: Node) -> None:
    """Publish calls fail with the same text until the file exists."""
    pem = node.authority.root_file.read_bytes()
    for content, problem in (
        (None, "the root certificate of the authority does not exist yet"),
        (b"x", "does not contain a PEM certificate"),
    ):
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


async def test_driver_is_not_ready_with_a_wrong_kubelet_directory(node: Node) -> None:
    """The probe names the option."""
    registry, away = node.kubelet.root / "plugins_registry", node.kubelet.root / "away"
    await node.kubelet.register()
    registry.rename(away)
    try:
        status, text = node.driver.get("/readyz")
    finally:
        away.rename(registry)
    assert status == 503
    assert "--kubelet-dir" in text
    assert "does not contain plugins_registry" in text


async def test_liveness_does_not_depend_on_the_authority(node: Node) -> None:
    """Unknown paths return 404."""
    await node.authority.stop()
    assert node.driver.get("/healthz") == (200, "ok\n")
    assert node.driver.get("/")[0] == 404


async def test_metrics_count_volumes_calls_and_renewals(node: Node) -> None:
    """Calls by method and reason."""
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
    # A call is counted after its response was sent.
    await until(lambda: (count("") - good, count("InvalidRequest") - bad) == (1, 1), "both calls are counted")
    assert node.metric("certmount_node_volumes") == 1
    await until(lambda: node.metric("certmount_node_renewals_total") > renewals, "a renewal is counted")
    assert node.metric("certmount_node_first_expiry_timestamp_seconds") > 0


async def test_healthy_volume_has_no_health_entries(node: Node) -> None:
    """The path is optional. An unknown volume or path is NOT_FOUND."""
    request = await node.published()
    assert await node.health(request) == []
    health_request = csi_pb2.NodeGetVolumeHealthRequest(volume_id=request.volume_id)
    assert not (await node.stub.NodeGetVolumeHealth(health_request)).volume_health.health_statuses
    for unknown in (
        csi_pb2.NodeGetVolumeHealthRequest(volume_id="csi-unknown"),
        csi_pb2.NodeGetVolumeHealthRequest(volume_id=request.volume_id, volume_publish_path="/some/path"),
    ):
        failure = await failure_of(node.stub.NodeGetVolumeHealth(unknown))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "VolumeNotFound")
    failure = await failure_of(node.stub.NodeGetVolumeHealth(csi_pb2.NodeGetVolumeHealthRequest()))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
