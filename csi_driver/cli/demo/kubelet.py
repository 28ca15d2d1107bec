"""Simulates the kubelet: registers the driver, creates pod directories, publishes and unpublishes volumes."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from csi_driver import DRIVER_NAME, POD_AUDIENCE
from csi_driver._proto import csi_pb2, csi_pb2_grpc, registration_pb2, registration_pb2_grpc
from csi_driver.cli.demo.errors import DemoError
from csi_driver.cli.demo.tokens import DemoPod, DemoTokenIssuer

_CALL_TIMEOUT_S = 30.0
# The driver creates its socket when it starts, so reconnect often.
_OPTIONS = tuple((f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "min", "max"))


@dataclass(frozen=True, slots=True)
class DemoVolume:
    """A pod's volume. Its files are in ``target``."""

    pod: DemoPod
    volume_id: str
    target: Path


class PublishError(Exception):
    """The driver did not publish a volume. The message is the text of the pod event."""


class DemoKubelet:
    """The kubelet of the demo's node. Creates its root directory; call ``register`` first."""

    def __init__(self, root: Path, tokens: DemoTokenIssuer) -> None:
        self.root = root
        self._tokens = tokens
        self._channel: grpc.aio.Channel | None = None
        for name in ("pods", "plugins", "plugins_registry"):
            (root / name).mkdir(parents=True)

    async def register(self) -> str:
        """Wait for the driver, register it and connect to its CSI socket; return the driver's node ID."""
        socket = self.root / "plugins_registry" / f"{DRIVER_NAME}-reg.sock"
        with _failures_of("registering the driver"):
            async with grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS) as channel:
                stub: registration_pb2_grpc.RegistrationAsyncStub = registration_pb2_grpc.RegistrationStub(channel)
                info = await stub.GetInfo(registration_pb2.InfoRequest(), timeout=_CALL_TIMEOUT_S, wait_for_ready=True)
                self._channel = grpc.aio.insecure_channel(f"unix:{info.endpoint}", options=_OPTIONS)
                node = await self._node().NodeGetInfo(
                    csi_pb2.NodeGetInfoRequest(), timeout=_CALL_TIMEOUT_S, wait_for_ready=True
                )
                status = registration_pb2.RegistrationStatus(plugin_registered=True)
                await stub.NotifyRegistrationStatus(status, timeout=_CALL_TIMEOUT_S)
        return node.node_id

    async def publish(self, pod: DemoPod, attributes: Mapping[str, str]) -> DemoVolume:
        """Publish a volume for a pod whose fsGroup is this process's group. Raises PublishError."""
        target = self.root / "pods" / pod.uid / "volumes" / "kubernetes.io~csi" / "tls" / "mount"
        target.parent.mkdir(parents=True)
        volume = DemoVolume(pod, f"csi-{secrets.token_hex(32)}", target)
        try:
            await self._node().NodePublishVolume(self._request(volume, attributes), timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            # Like the kubelet: a failed call may have left a partly published volume.
            await self.unpublish(volume)
            raise PublishError(error.details() or error.code().name) from None
        return volume

    async def unpublish(self, volume: DemoVolume) -> None:
        """Unpublish the volume and delete the pod's directory."""
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume.volume_id, target_path=str(volume.target))
        with _failures_of(f"unpublishing the volume of pod {volume.pod}"):
            await self._node().NodeUnpublishVolume(request, timeout=_CALL_TIMEOUT_S)
        shutil.rmtree(self.root / "pods" / volume.pod.uid)

    def leftovers(self) -> list[Path]:
        """Return what the driver still stores for any volume."""
        return sorted((self.root / "plugins" / DRIVER_NAME / "volumes").iterdir())

    async def aclose(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    def _node(self) -> csi_pb2_grpc.NodeAsyncStub:
        if self._channel is None:
            raise DemoError("the driver is not registered yet")
        return csi_pb2_grpc.NodeStub(self._channel)

    def _request(self, volume: DemoVolume, attributes: Mapping[str, str]) -> csi_pb2.NodePublishVolumeRequest:
        pod, prefix = volume.pod, "csi.storage.k8s.io/"
        token = {"token": self._tokens.issue(pod, POD_AUDIENCE).reveal()}
        access = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
        mount = csi_pb2.VolumeCapability.MountVolume(volume_mount_group=str(os.getegid()))
        return csi_pb2.NodePublishVolumeRequest(
            volume_id=volume.volume_id,
            target_path=str(volume.target),
            volume_capability=csi_pb2.VolumeCapability(mount=mount, access_mode=access),
            readonly=True,
            secrets={f"{prefix}serviceAccount.tokens": json.dumps({POD_AUDIENCE: token})},
            volume_context={
                **attributes,
                f"{prefix}pod.name": pod.name,
                f"{prefix}pod.namespace": pod.account.namespace,
                f"{prefix}pod.uid": pod.uid,
                f"{prefix}serviceAccount.name": pod.account.name,
                f"{prefix}ephemeral": "true",
            },
        )


@contextmanager
def _failures_of(operation: str) -> Iterator[None]:
    """Turn the error of a call that must succeed into a DemoError with the driver's message."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise DemoError(f"{operation}: {error.details() or error.code().name}") from None
