"""Makes the driver known to the kubelet, which watches its ``plugins_registry`` folder for sockets (KEP-595)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import structlog

from csi_driver import DRIVER_NAME
from csi_driver._proto import registration_pb2, registration_pb2_grpc
from csi_driver.core.errors import CertmountError, Fault, Reason

log = structlog.get_logger(__name__)

_LONGEST_SOCKET = 107
"""unix(7): sun_path without its final NUL."""


def listen(server: grpc.aio.Server, socket: Path) -> None:
    """Has the server listen at a unix socket, whatever lay there before. Raises CertmountError InvalidKubeletDirectory."""
    try:
        socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{socket}")
    except (OSError, RuntimeError):  # gRPC says no more than that it failed
        problem = f"no socket can be made at {socket}"
        hint = f"its folder must be there and writable, and the path be {_LONGEST_SOCKET} bytes long at the most"
        raise CertmountError(Reason.INVALID_KUBELET_DIRECTORY, Fault("--kubelet-dir", problem, hint)) from None


class Registration(registration_pb2_grpc.RegistrationServicer):
    """Answers the kubelet's questions at ``<kubelet>/plugins_registry/<driver>-reg.sock``; serve CSI before starting it."""

    def __init__(self, kubelet_dir: Path, csi_socket: Path) -> None:
        self._csi_socket = csi_socket
        self._socket = kubelet_dir / "plugins_registry" / f"{DRIVER_NAME}-reg.sock"
        self._server: grpc.aio.Server | None = None
        self.problem = "the kubelet has not registered the driver yet"
        """Why the kubelet does not know the driver; empty when it does."""

    async def start(self) -> None:
        """Makes the socket anew, which is what the kubelet notices."""
        server = grpc.aio.server()
        registration_pb2_grpc.add_RegistrationServicer_to_server(self, server)
        listen(server, self._socket)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Takes the socket away; the kubelet forgets the driver until the next start."""
        if self._server is not None:
            await self._server.stop(grace=0)
        self._socket.unlink(missing_ok=True)

    async def GetInfo(
        self, _request: registration_pb2.InfoRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> registration_pb2.PluginInfo:
        """Who we are and where we serve CSI."""
        return registration_pb2.PluginInfo(
            type="CSIPlugin", name=DRIVER_NAME, endpoint=str(self._csi_socket), supported_versions=["1.0.0"]
        )

    async def NotifyRegistrationStatus(
        self, request: registration_pb2.RegistrationStatus, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> registration_pb2.RegistrationStatusResponse:
        """How it went; on a failure the kubelet tries again by itself."""
        if request.plugin_registered:
            self.problem = ""
            log.info("registered with the kubelet")
        else:
            self.problem = f"the kubelet did not register the driver: {request.error[:500]}"
            log.error("not registered with the kubelet", error=request.error[:500])
        return registration_pb2.RegistrationStatusResponse()
