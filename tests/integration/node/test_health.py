"""Registration, probes, metrics and volume health."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta

import grpc
import pytest

from csi_driver._proto import csi_pb2
from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.world import Node, failure_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_registration_has_the_csi_socket(node: Node) -> None:
    info = await node.kubelet.register()
    assert (info.type, info.name) == ("CSIPlugin", "csi.certmount.dev")
    assert list(info.supported_versions) == ["1.0.0"]
    async with grpc.aio.insecure_channel(f"unix:{info.endpoint}") as channel:
        answer: grpc.aio.UnaryUnaryMultiCallable[bytes, csi_pb2.GetPluginInfoResponse] = channel.unary_unary(
            "/csi.v1.Identity/GetPluginInfo", response_deserializer=csi_pb2.GetPluginInfoResponse.FromString
        )
        assert (await answer(b"")).name == info.name


async def test_driver_is_ready_after_its_registration(node: Node) -> None:
    await node.restart()
    status, text = node.driver.get("/readyz")
    assert (status, "the kubelet has not registered the driver yet" in text) == (503, True)
    await node.kubelet.register()
    assert node.driver.get("/readyz") == (200, "ok\n")


async def test_driver_with_a_root_has_started(node: Node) -> None:
    assert node.driver.get("/startupz") == (200, "ok\n")


async def test_driver_registers_again_after_a_failed_registration(node: Node) -> None:
    """The kubelet does not retry, for example if it could not reach the API server; it detects only a new socket."""
    socket, kept = node.kubelet.registration_socket, node.kubelet.root / "failed.sock"
    await until(socket.exists, "a socket")
    kept.hardlink_to(socket)  # the new socket gets another inode
    await node.kubelet.register(error="error updating CSINode: connection refused")
    status, text = node.driver.get("/readyz")
    assert (status, "error updating CSINode: connection refused" in text) == (503, True)
    await until(lambda: socket.exists() and not socket.samefile(kept), "a new socket")
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
    await node.authority.stop()
    assert node.driver.get("/healthz") == (200, "ok\n")
    assert node.driver.get("/")[0] == 404


def publish_calls(node: Node, reason: str) -> float:
    series = f'certmount_node_call_duration_seconds_count{{method="NodePublishVolume",reason="{reason}"}}'
    _, page = node.driver.get("/metrics")
    found = re.search(re.escape(series) + r" (\S+)", page)
    return float(found[1]) if found else 0.0


async def test_metrics_count_volumes_calls_and_renewals(node: Node) -> None:
    def count(reason: str) -> float:
        return publish_calls(node, reason)

    good, bad = count("Ok"), count("InvalidRequest")
    renewals = node.metric("certmount_node_renewals_total")
    node.script.renew_after = timedelta(seconds=0.2)
    await node.published()
    await failure_of(node.publish(node.request(read_only=False)))
    # A call is counted after its response was sent.
    await until(lambda: (count("Ok") - good, count("InvalidRequest") - bad) == (1, 1), "both calls are counted")
    await until(lambda: node.metric("certmount_node_volumes") == 1, "the metric")
    await until(lambda: node.metric("certmount_node_renewals_total") > renewals, "a renewal is counted")
    await until(lambda: node.metric("certmount_node_first_expiry_timestamp_seconds") > 0, "the metric")


async def test_call_that_its_caller_ends_is_not_counted_as_successful(node: Node) -> None:
    successful, cancelled = publish_calls(node, "Ok"), publish_calls(node, "Cancelled")
    calls, node.script.gate = node.script.calls, asyncio.Event()
    call = asyncio.ensure_future(node.publish(node.request()))
    await until(lambda: node.script.calls > calls, "the request")
    call.cancel()
    await until(lambda: publish_calls(node, "Cancelled") == cancelled + 1, "the call is counted")
    assert publish_calls(node, "Ok") == successful


async def test_healthy_volume_has_no_health_entries(node: Node) -> None:
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


async def test_health_has_no_percent_signs_that_a_kubelet_could_format(node: Node) -> None:
    node.script.renew_after = timedelta(seconds=0.2)
    request = await node.published()
    calls = node.script.calls
    node.script.failure = CertmountError(Reason.NAME_NOT_ALLOWED, "https://a.example/%2F%s is not allowed")
    await until(lambda: node.script.calls > calls + 1, "a renewal has failed")
    ((_, _, message),) = await node.health(request)
    assert "https://a.example/\uff052F\uff05s is not allowed" in message
    assert "%" not in message


async def test_volume_without_its_mount_is_inaccessible_until_the_next_publish_call(node: Node) -> None:
    request = await node.published()
    if node.real_mounts:
        node.unmount(request)
    else:
        node.target(request).unlink()
        node.target(request).mkdir()
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (csi_pb2.INACCESSIBLE, "VolumeDamaged")
    assert message == (
        f"the volume of pod web/shop is damaged: it is not mounted at {request.target_path}; the driver repairs it at the "
        "kubelet's next publish call; then restart containers that see no files"
    )
    await node.publish(request)
    assert await node.health(request) == []
    assert node.shown(request).names


async def test_volume_without_files_is_inaccessible_until_the_next_publish_call(node: Node) -> None:
    request = await node.published()
    (node.volume_dir(request) / "files" / "..data").unlink()
    ((status, reason, message),) = await node.health(request)
    assert (status, reason) == (csi_pb2.INACCESSIBLE, "VolumeDamaged")
    assert "is damaged: its files do not exist; the driver repairs it" in message
    await node.publish(request)
    assert await node.health(request) == []
    assert node.shown(request).names


async def test_storage_health_counts_the_volumes_by_problem(node: Node) -> None:
    """Kubelets up to 1.37 ask for the health of persistent volumes only, but for that of the storage of every driver."""
    assert await _storage_health(node) == []
    await node.published()
    node.script.renew_after = timedelta(seconds=0.2)
    renewed = [await node.published() for _ in range(2)]
    assert await _storage_health(node) == []
    node.script.failure = CertmountError(Reason.NAME_NOT_ALLOWED, "https://a.example/%2F is not allowed")
    damaged = await node.published(attributes={"root-only": "true"})
    (node.volume_dir(damaged) / "files" / "..data").unlink()
    await until(lambda: node.metric("certmount_node_volumes_unhealthy", reason="NameNotAllowed") == 2, "two failures")
    first, second = await _storage_health(node)
    assert first[:2] == (csi_pb2.STORAGE_DEGRADED, "NameNotAllowed")
    assert first[2].startswith(
        "2 of 4 volumes on this node, such as: the renewal of the certificate of pod web/shop failed"
    )
    assert "\uff052F is not allowed" in first[2]
    assert second[:2] == (csi_pb2.STORAGE_DEGRADED, "VolumeDamaged")
    assert second[2].startswith("1 of 4 volumes on this node, such as: the volume of pod web/shop is damaged")
    for request in (*renewed, damaged):
        await node.unpublish(request)
    assert await _storage_health(node) == []


async def _storage_health(node: Node) -> list[tuple[int, str, str]]:
    answer = await node.stub.NodeGetStorageHealth(csi_pb2.NodeGetStorageHealthRequest(), timeout=20.0)
    return [(entry.status, entry.reason, entry.message) for entry in answer.backend_health]
