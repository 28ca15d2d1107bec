"""A proxy that adds what csi-sanity needs: a CSI controller, and the kubelet's part of publish calls.

csi-sanity takes the volume context from CreateVolume, and runs many tests only if the driver has a controller. For inline
volumes, the kubelet creates the context and sets ``readonly``. So this proxy implements the Controller service, sets
``readonly`` in publish calls, and forwards all other calls to the driver.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import grpc

from csi_driver._proto import csi_pb2
from tests.support.api_objects import field

_Handler = Callable[[bytes, Any], Awaitable[bytes]]
_Service = csi_pb2.PluginCapability.Service


class SanityController(grpc.GenericRpcHandler):
    """Serves on a unix socket. ``context`` returns the volume_context of each new volume."""

    def __init__(self, socket: Path, driver: grpc.aio.Channel, context: Callable[[], Mapping[str, str]]) -> None:
        self.address = f"unix:{socket}"
        self._driver = driver
        self._context = context
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(self.address)
        self._handlers: Mapping[str, _Handler] = {
            "/csi.v1.Controller/CreateVolume": self._create_volume,
            "/csi.v1.Controller/DeleteVolume": self._return_empty,
            "/csi.v1.Controller/ControllerGetCapabilities": self._return_empty,
            "/csi.v1.Identity/GetPluginCapabilities": self._capabilities,
            "/csi.v1.Node/NodePublishVolume": self._publish,
        }

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        return grpc.unary_unary_rpc_method_handler(self._handlers.get(method) or self._forwarder(method))

    def _forwarder(self, method: str) -> _Handler:
        async def forward(request: bytes, context: Any) -> bytes:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._driver.unary_unary(method)
            try:
                return await call(request, timeout=context.time_remaining())
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details())
                raise AssertionError from error  # abort does not return

        return forward

    async def _return_empty(self, _request: bytes, _context: Any) -> bytes:
        return b""

    async def _create_volume(self, _request: bytes, _context: Any) -> bytes:
        """CreateVolumeResponse {Volume volume = 1}; Volume {string volume_id = 2; map<string, string> volume_context = 3}."""
        entries = [field(3, _text(1, key) + _text(2, value)) for key, value in self._context().items()]
        return field(1, _text(2, f"csi-{uuid.uuid4().hex}") + b"".join(entries))

    async def _capabilities(self, request: bytes, context: Any) -> bytes:
        response = await self._forwarder("/csi.v1.Identity/GetPluginCapabilities")(request, context)
        capabilities = csi_pb2.GetPluginCapabilitiesResponse.FromString(response)
        capabilities.capabilities.add(service=_Service(type=_Service.CONTROLLER_SERVICE))
        return capabilities.SerializeToString()

    async def _publish(self, request: bytes, context: Any) -> bytes:
        publish = csi_pb2.NodePublishVolumeRequest.FromString(request)
        publish.readonly = True
        return await self._forwarder("/csi.v1.Node/NodePublishVolume")(publish.SerializeToString(), context)


def _text(number: int, text: str) -> bytes:
    return field(number, text.encode())
