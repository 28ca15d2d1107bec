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
from csi_driver.node.publishing.publish import Publisher
from csi_driver.node.publishing.published_volumes import PublishedVolumes

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Rpc = csi_pb2.NodeServiceCapability.RPC
_CAPABILITIES = (_Rpc.VOLUME_MOUNT_GROUP, _Rpc.GET_VOLUME_STATS, _Rpc.GET_VOLUME_HEALTH)


def describe_call(_method: str, request: object) -> Mapping[str, str]:
    fields: dict[str, str] = {}
    if volume_id := getattr(request, "volume_id", ""):
        fields["volume"] = volume_id[:256]
    if isinstance(request, csi_pb2.NodePublishVolumeRequest):
        context = request.volume_context
        pod = f"{context.get('csi.storage.k8s.io/pod.namespace', '')}/{context.get('csi.storage.k8s.io/pod.name', '')}"
        fields["pod"] = pod[:320]
    return fields


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
        """Return DEGRADED with a reason if the renewal fails or the certificate has expired. The files stay readable."""
        _require(request, "volume_id")
        health = csi_pb2.VolumeHealth(volume_id=request.volume_id)
        if problem := self.published.problem(request.volume_id, request.volume_publish_path):
            health.health_statuses.add(status=csi_pb2.DEGRADED, reason=problem.reason, message=problem.message)
        return csi_pb2.NodeGetVolumeHealthResponse(volume_health=health)

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
