"""Plays the kubelet: finds the driver's socket, registers it, makes pod folders, publishes and unpublishes volumes."""

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
from csi_driver.cli.demo.failure import DemoFailed
from csi_driver.cli.demo.tokens import Pod, TokenIssuer

_CALL_S = 30.0
# The socket appears when the driver has started; to look often costs nothing.
_OPTIONS = tuple((f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "min", "max"))


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume of a pod; its files are at ``target``."""

    pod: Pod
    volume_id: str
    target: Path


class Refused(Exception):
    """The driver did not publish a volume; the text is what an event of the pod would say."""


class Kubelet:
    """One node's. Its root directory is made here; ``register`` comes first."""

    def __init__(self, root: Path, tokens: TokenIssuer) -> None:
        self.root = root
        self.plugin_folder = root / "plugins" / DRIVER_NAME
        self._tokens = tokens
        self._channel: grpc.aio.Channel | None = None
        for name in ("pods", "plugins", "plugins_registry"):
            (root / name).mkdir(parents=True)

    async def register(self) -> str:
        """Waits for the driver, asks who it is, connects to its CSI socket; gives the node's name as the driver knows it."""
        socket = self.root / "plugins_registry" / f"{DRIVER_NAME}-reg.sock"
        with _explained("registering the driver"):
            async with grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS) as channel:
                registration: registration_pb2_grpc.RegistrationAsyncStub = registration_pb2_grpc.RegistrationStub(
                    channel
                )
                info = await registration.GetInfo(registration_pb2.InfoRequest(), timeout=_CALL_S, wait_for_ready=True)
                self._channel = grpc.aio.insecure_channel(f"unix:{info.endpoint}", options=_OPTIONS)
                node = await self._node().NodeGetInfo(
                    csi_pb2.NodeGetInfoRequest(), timeout=_CALL_S, wait_for_ready=True
                )
                status = registration_pb2.RegistrationStatus(plugin_registered=True)
                await registration.NotifyRegistrationStatus(status, timeout=_CALL_S)
        return node.node_id

    async def publish(self, pod: Pod, attributes: Mapping[str, str]) -> Volume:
        """Sets up a pod's volume; its fsGroup is our own group. Raises Refused with the driver's words."""
        target = self.root / "pods" / pod.uid / "volumes" / "kubernetes.io~csi" / "tls" / "mount"
        target.parent.mkdir(parents=True)
        volume = Volume(pod, f"csi-{secrets.token_hex(32)}", target)
        try:
            await self._node().NodePublishVolume(self._request(volume, attributes), timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            # What the kubelet does after an error: unpublish, as something may be half made.
            await self.unpublish(volume)
            raise Refused(error.details() or error.code().name) from None
        return volume

    async def unpublish(self, volume: Volume) -> None:
        """Has the driver take the volume away, then removes the pod's folder."""
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume.volume_id, target_path=str(volume.target))
        with _explained(f"unpublishing the volume of pod {volume.pod}"):
            await self._node().NodeUnpublishVolume(request, timeout=_CALL_S)
        shutil.rmtree(self.root / "pods" / volume.pod.uid)

    def leftovers(self) -> list[Path]:
        """What the driver still keeps of any volume."""
        return sorted((self.plugin_folder / "volumes").iterdir())

    async def aclose(self) -> None:
        """Ends the connection to the driver."""
        if self._channel is not None:
            await self._channel.close()

    def _node(self) -> csi_pb2_grpc.NodeAsyncStub:
        if self._channel is None:
            raise DemoFailed("the driver is not registered yet")
        return csi_pb2_grpc.NodeStub(self._channel)

    def _request(self, volume: Volume, attributes: Mapping[str, str]) -> csi_pb2.NodePublishVolumeRequest:
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
def _explained(what: str) -> Iterator[None]:
    """Calls that must not fail; if one does all the same, the driver's words are shown."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise DemoFailed(f"{what}: {error.details() or error.code().name}") from None
