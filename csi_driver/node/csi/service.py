"""The Identity and Node services of CSI 1.13."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver import DRIVER_NAME, __version__
from csi_driver._proto import csi_pb2, csi_pb2_grpc
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.texts import shortened_to_bytes
from csi_driver.node.publishing.publish import Publisher
from csi_driver.node.publishing.published_volumes import PublishedVolumes

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Rpc = csi_pb2.NodeServiceCapability.RPC
MAX_CALL_BYTES = 256 * 1024
"""Bytes of a call: the largest volume attributes, names and tokens need half of it. Each call is in memory until it ends."""
MAX_CALLS = 1000
"""Connections, of which the kubelet opens one for each call. Each uses 43 KiB. The kubelet retries the calls beyond them."""
MAX_RECEIVING = 64
"""Calls of a method whose request is received at a time. A publish call is then counted in the memory of its namespace."""
MAX_HEALTH_BYTES = 1024
"""Bytes of a message of a health condition that the API server accepts."""
_CAPABILITIES = (_Rpc.VOLUME_MOUNT_GROUP, _Rpc.GET_VOLUME_STATS, _Rpc.GET_VOLUME_HEALTH, _Rpc.GET_STORAGE_HEALTH)


def describe_call(_method: str, request: object) -> Mapping[str, str]:
    fields: dict[str, str] = {}
    if volume_id := getattr(request, "volume_id", ""):
        fields["volume"] = volume_id[:256]
    if isinstance(request, csi_pb2.NodePublishVolumeRequest):
        context = request.volume_context
        pod = f"{context.get('csi.storage.k8s.io/pod.namespace', '')}/{context.get('csi.storage.k8s.io/pod.name', '')}"
        fields["pod"] = pod[:320]
    return fields


def kubelet_text(text: str) -> str:
    """Return a text that reads the same in the event of every kubelet. Each text for the kubelet goes through this function.

    The kubelet of Kubernetes 1.34 uses the text of a status as a format of fmt.Sprintf; that of 1.37 prints it unchanged.
    No text with a percent sign survives both, so the full-width percent sign (U+FF05) replaces it.
    """
    return text.replace("%", "\uff05")


def health_text(text: str) -> str:
    """Return the beginning of a text that the API server accepts as the message of a health condition."""
    return shortened_to_bytes(kubelet_text(text), MAX_HEALTH_BYTES)


class IdentityService(csi_pb2_grpc.IdentityServicer):
    """The CSI Identity service."""

    async def GetPluginInfo(
        self, _request: csi_pb2.GetPluginInfoRequest, _context: _Context
    ) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=__version__)

    async def GetPluginCapabilities(
        self, _request: csi_pb2.GetPluginCapabilitiesRequest, _context: _Context
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        return csi_pb2.GetPluginCapabilitiesResponse()

    async def Probe(self, _request: csi_pb2.ProbeRequest, _context: _Context) -> csi_pb2.ProbeResponse:
        """Return ready. Existing volumes work even if the authority is unavailable."""
        return csi_pb2.ProbeResponse(ready=BoolValue(value=True))


@dataclass(eq=False)
class NodeService(csi_pb2_grpc.NodeServicer):
    """The CSI Node service."""

    node_name: str
    publisher: Publisher
    published: PublishedVolumes

    async def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, _context: _Context
    ) -> csi_pb2.NodePublishVolumeResponse:
        await self.publisher.publish(request)
        return csi_pb2.NodePublishVolumeResponse()

    async def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, _context: _Context
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        _require(request, "volume_id", "target_path")
        await self.published.unpublish(request.volume_id, request.target_path)
        return csi_pb2.NodeUnpublishVolumeResponse()

    async def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, _context: _Context
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        _require(request, "volume_id", "volume_path")
        usage = self.published.usage(request.volume_id, request.volume_path)
        space = csi_pb2.VolumeUsage(
            unit=csi_pb2.VolumeUsage.BYTES,
            total=usage.f_blocks * usage.f_frsize,
            used=(usage.f_blocks - usage.f_bfree) * usage.f_frsize,
            available=usage.f_bavail * usage.f_frsize,
        )
        inodes = csi_pb2.VolumeUsage(
            unit=csi_pb2.VolumeUsage.INODES,
            total=usage.f_files,
            used=usage.f_files - usage.f_ffree,
            available=usage.f_favail,
        )
        return csi_pb2.NodeGetVolumeStatsResponse(usage=[space, inodes])

    async def NodeGetVolumeHealth(
        self, request: csi_pb2.NodeGetVolumeHealthRequest, _context: _Context
    ) -> csi_pb2.NodeGetVolumeHealthResponse:
        """Return why the volume is unhealthy.

        It is DEGRADED if the renewal fails or the certificate has expired: the files stay readable. It is INACCESSIBLE
        if the files or the mount do not exist.
        """
        _require(request, "volume_id")
        health = csi_pb2.VolumeHealth(volume_id=request.volume_id)
        if problem := self.published.problem(request.volume_id, request.volume_publish_path):
            status = csi_pb2.INACCESSIBLE if problem.inaccessible else csi_pb2.DEGRADED
            health.health_statuses.add(status=status, reason=problem.reason, message=health_text(problem.message))
        return csi_pb2.NodeGetVolumeHealthResponse(volume_health=health)

    async def NodeGetStorageHealth(
        self, _request: csi_pb2.NodeGetStorageHealthRequest, _context: _Context
    ) -> csi_pb2.NodeGetStorageHealthResponse:
        """Return the problems of all volumes: kubelets ask for the health of single volumes only if these are persistent."""
        response = csi_pb2.NodeGetStorageHealthResponse()
        for problem in self.published.problems():
            text = health_text(problem.message)
            response.backend_health.add(status=csi_pb2.STORAGE_DEGRADED, reason=problem.reason, message=text)
        return response

    async def NodeGetCapabilities(
        self, _request: csi_pb2.NodeGetCapabilitiesRequest, _context: _Context
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[csi_pb2.NodeServiceCapability(rpc=_Rpc(type=capability)) for capability in _CAPABILITIES]
        )

    async def NodeGetInfo(
        self, _request: csi_pb2.NodeGetInfoRequest, _context: _Context
    ) -> csi_pb2.NodeGetInfoResponse:
        """Return the node's name, without topology: a volume can be published on any node."""
        return csi_pb2.NodeGetInfoResponse(node_id=self.node_name)


def _require(request: object, *fields: str) -> None:
    faults = [Fault(field, "is empty") for field in fields if not getattr(request, field)]
    if faults:
        raise CertmountError(Reason.INVALID_REQUEST, *faults)
