"""Register the driver with the kubelet, which watches its ``plugins_registry`` directory for sockets (KEP-595)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import structlog

from csi_driver import DRIVER_NAME
from csi_driver._proto import registration_pb2, registration_pb2_grpc
from csi_driver.core.errors import CertmountError, Fault, Reason

log = structlog.get_logger(__name__)

_MAX_SOCKET_PATH = 107  # the size of sun_path in unix(7) without the final NUL


def listen(server: grpc.aio.Server, socket: Path) -> None:
    """Make the server listen on a unix socket, and replace an existing file. Raises CertmountError InvalidKubeletDirectory."""
    try:
        socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{socket}")
    except (OSError, RuntimeError):  # gRPC does not report the cause
        problem = f"cannot create the socket {socket}"
        hint = f"its directory must exist and be writable, and the path can have at most {_MAX_SOCKET_PATH} bytes"
        raise CertmountError(Reason.INVALID_KUBELET_DIRECTORY, Fault("--kubelet-dir", problem, hint)) from None


class KubeletRegistration(registration_pb2_grpc.RegistrationServicer):
    """Serves ``<kubelet>/plugins_registry/<driver>-reg.sock``. Serve CSI before you start it."""

    def __init__(self, kubelet_dir: Path, csi_socket: Path) -> None:
        self._csi_socket = csi_socket
        self._socket = kubelet_dir / "plugins_registry" / f"{DRIVER_NAME}-reg.sock"
        self._server: grpc.aio.Server | None = None
        self._failed = asyncio.Event()
        self.problem = "the kubelet has not registered the driver yet"
        """Why the kubelet has not registered the driver; empty if it has."""

    async def start(self) -> None:
        self._failed.clear()
        server = grpc.aio.server()
        registration_pb2_grpc.add_RegistrationServicer_to_server(self, server)
        listen(server, self._socket)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Remove the socket: the kubelet deregisters the driver until the next start."""
        if self._server is not None:
            await self._server.stop(grace=0)
        self._socket.unlink(missing_ok=True)

    async def wait_for_failure(self) -> None:
        """Return after the kubelet has reported a failed registration. It does not retry until the socket is a new one."""
        await self._failed.wait()

    async def GetInfo(
        self, _request: registration_pb2.InfoRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> registration_pb2.PluginInfo:
        return registration_pb2.PluginInfo(
            type="CSIPlugin", name=DRIVER_NAME, endpoint=str(self._csi_socket), supported_versions=["1.0.0"]
        )

    async def NotifyRegistrationStatus(
        self, request: registration_pb2.RegistrationStatus, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> registration_pb2.RegistrationStatusResponse:
        """Record the result. A registration fails, for example, while the kubelet cannot reach the API server."""
        if request.plugin_registered:
            self.problem = ""
            log.info("registered with the kubelet")
        else:
            self.problem = f"the kubelet did not register the driver: {request.error[:500]}"
            log.error("registration failed; the driver registers again", error=request.error[:500])
            self._failed.set()
        return registration_pb2.RegistrationStatusResponse()
