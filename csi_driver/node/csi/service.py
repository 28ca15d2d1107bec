"""CSI's Identity and Node services (CSI 1.13). Protobuf stops here; what a call means is the publisher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver import DRIVER_NAME, __version__
from csi_driver._proto import csi_pb2, csi_pb2_grpc
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.node.publishing.publish import Publisher
from csi_driver.node.publishing.publish_request import check_read_only, parse_publish

log = structlog.get_logger(__name__)

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Rpc = csi_pb2.NodeServiceCapability.RPC
_CAPABILITIES = (_Rpc.VOLUME_MOUNT_GROUP, _Rpc.GET_VOLUME_STATS, _Rpc.GET_VOLUME_HEALTH)


def describe_call(_method: str, request: object) -> Mapping[str, str]:
    """The log fields of a call: which volume, and of which pod."""
    fields: dict[str, str] = {}
    if volume_id := getattr(request, "volume_id", ""):
        fields["volume"] = volume_id[:256]
    if isinstance(request, csi_pb2.NodePublishVolumeRequest):
        context = request.volume_context
        pod = f"{context.get('csi.storage.k8s.io/pod.namespace', '')}/{context.get('csi.storage.k8s.io/pod.name', '')}"
        fields["pod"] = pod[:320]
    return fields


class IdentityService(csi_pb2_grpc.IdentityServicer):
    """Who the driver is."""

    async def GetPluginInfo(
        self, _request: csi_pb2.GetPluginInfoRequest, _context: _Context
    ) -> csi_pb2.GetPluginInfoResponse:
        """Name and version."""
        return csi_pb2.GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=__version__)

    async def GetPluginCapabilities(
        self, _request: csi_pb2.GetPluginCapabilitiesRequest, _context: _Context
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        """None: there is no controller."""
        return csi_pb2.GetPluginCapabilitiesResponse()

    async def Probe(self, _request: csi_pb2.ProbeRequest, _context: _Context) -> csi_pb2.ProbeResponse:
        """Ready as soon as it answers: volumes can be looked after even while the authority is away."""
        return csi_pb2.ProbeResponse(ready=BoolValue(value=True))


class NodeService(csi_pb2_grpc.NodeServicer):
    """The volumes of one node."""

    def __init__(self, node_name: str, publisher: Publisher) -> None:
        self._node_name = node_name
        self._publisher = publisher

    async def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, _context: _Context
    ) -> csi_pb2.NodePublishVolumeResponse:
        """The first publish fails with what is wrong. A later one never does while the pod has its files.

        Kubelets before 1.37 (kubernetes#121271) take the mount away from a running pod on the error of a republish.
        """
        try:
            check_read_only(request.readonly)
            await self._publisher.publish(parse_publish(request))
        except CertmountError as error:
            if not self._publisher.is_live(request.volume_id, request.target_path):
                raise
            log.warning("the volume stays as it is", reason=error.reason.word, error=str(error))
        return csi_pb2.NodePublishVolumeResponse()

    async def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, _context: _Context
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        """Removes the volume; anything unknown is removed already."""
        _require(request, "volume_id", "target_path")
        await self._publisher.unpublish(request.volume_id, request.target_path)
        return csi_pb2.NodeUnpublishVolumeResponse()

    async def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, _context: _Context
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        """Space and inodes of the volume's own tmpfs."""
        _require(request, "volume_id", "volume_path")
        self._publisher.find(request.volume_id, request.volume_path)
        usage = self._publisher.usage(request.volume_id)
        bytes_ = csi_pb2.VolumeUsage(
            unit=csi_pb2.VolumeUsage.BYTES,
            total=usage.total_bytes,
            used=usage.used_bytes,
            available=usage.available_bytes,
        )
        inodes = csi_pb2.VolumeUsage(
            unit=csi_pb2.VolumeUsage.INODES,
            total=usage.total_inodes,
            used=usage.used_inodes,
            available=usage.available_inodes,
        )
        return csi_pb2.NodeGetVolumeStatsResponse(usage=[bytes_, inodes])

    async def NodeGetVolumeHealth(
        self, request: csi_pb2.NodeGetVolumeHealthRequest, _context: _Context
    ) -> csi_pb2.NodeGetVolumeHealthResponse:
        """Degraded, with a reason, while the certificate can't be renewed or has expired; the files stay readable."""
        _require(request, "volume_id")
        health = csi_pb2.VolumeHealth(volume_id=request.volume_id)
        if trouble := self._publisher.trouble(request.volume_id, request.volume_publish_path):
            reason, message = trouble
            health.health_statuses.add(status=csi_pb2.DEGRADED, reason=reason, message=message)
        return csi_pb2.NodeGetVolumeHealthResponse(volume_health=health)

    async def NodeGetCapabilities(
        self, _request: csi_pb2.NodeGetCapabilitiesRequest, _context: _Context
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        """The pod's fsGroup is ours to apply; stats and health are given."""
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[csi_pb2.NodeServiceCapability(rpc=_Rpc(type=capability)) for capability in _CAPABILITIES]
        )

    async def NodeGetInfo(
        self, _request: csi_pb2.NodeGetInfoRequest, _context: _Context
    ) -> csi_pb2.NodeGetInfoResponse:
        """The node's name; certificates fit anywhere, so there is no topology."""
        return csi_pb2.NodeGetInfoResponse(node_id=self._node_name)


def _require(request: object, *fields: str) -> None:
    faults = [Fault(field, "is empty") for field in fields if not getattr(request, field)]
    if faults:
        raise CertmountError(Reason.INVALID_REQUEST, *faults)
