"""Send an HTTP request to the loopback interface of a pod, as ``kubectl port-forward`` does.

The API server passes the bytes through a WebSocket with the subprotocol ``v4.channel.k8s.io``. Each message starts with the
number of its channel: 0 has the data of the port, 1 the error of the kubelet. The first message of a channel is the port.
"""

from __future__ import annotations

import asyncio
import re

import aiohttp

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import ApiError
from csi_driver.kube.connection import Api

_PROTOCOL = "v4.channel.k8s.io"
_DATA, _ERROR = 0, 1
_PORT_BYTES = 2
_MAX_ERROR = 300
_LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]{1,9})\r\n")


async def get_from_pod(
    api: Api, namespace: str, pod: str, port: int, path: str, *, max_bytes: int, timeout_s: float
) -> bytes:
    """Return the body of the response to ``GET path``. Needs the verbs get and create on pods/portforward.

    Raises CertmountError APIServerUnavailable; ApiError if the API server refuses the connection.
    """
    target = f"pod {namespace}/{pod}"
    try:
        forward = f"/api/v1/namespaces/{namespace}/pods/{pod}/portforward"
        async with (
            asyncio.timeout(timeout_s),
            await api.open_websocket(forward, {"ports": str(port)}, _PROTOCOL) as socket,
        ):
            await socket.send_bytes(
                bytes([_DATA]) + f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode("ascii")
            )
            return _body(await _received(socket, max_bytes), target)
    except aiohttp.WSServerHandshakeError as error:
        problem = f"the API server does not forward port {port}: HTTP {error.status}"
        raise ApiError(Reason.API_SERVER_UNAVAILABLE, Fault(target, problem), error.status) from None
    except TimeoutError:
        raise _failed(target, f"does not respond within {timeout_s:.0f} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise _failed(target, f"cannot be reached through the API server ({type(error).__name__})") from None
    except ValueError as problem:
        raise _failed(target, str(problem)) from None


async def _received(socket: aiohttp.ClientWebSocketResponse[bool], max_bytes: int) -> bytes:
    """Return what the port sends until it closes the connection; raises ValueError."""
    channels: dict[int, bytearray] = {_DATA: bytearray(), _ERROR: bytearray()}
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
            continue
        channel = channels.get(message.data[0])
        if channel is None:
            raise ValueError(f"sent data of the unknown channel {message.data[0]}")
        channel += message.data[1:]
        if len(channel) > max_bytes:
            raise ValueError(f"sent more than {max_bytes} bytes")
        if _is_complete(channels[_DATA]):
            break  # a runtime can keep the connection open for a while
    if error := bytes(channels[_ERROR][_PORT_BYTES:]).decode(errors="replace").strip():
        raise ValueError(error[:_MAX_ERROR])
    return bytes(channels[_DATA][_PORT_BYTES:])


def _is_complete(received: bytearray) -> bool:
    head, separator, body = received.partition(b"\r\n\r\n")
    length = _LENGTH.search(head + b"\r\n")
    return bool(separator and length) and len(body) >= int(length[1])  # type: ignore[index]  # not None here


def _body(response: bytes, target: str) -> bytes:
    head, separator, body = response.partition(b"\r\n\r\n")
    status, *_ = [*head.split(b" ", 2)[1:2], b""]
    if not separator or not status.isdigit():
        raise ValueError("sent no HTTP response")
    if status != b"200":
        text = body.decode(errors="replace").strip()
        hint = "does the program have the version of this command?" if status == b"404" else ""
        raise CertmountError(
            Reason.API_SERVER_UNAVAILABLE, Fault(target, f"HTTP {int(status)}: {text[:_MAX_ERROR]}", hint)
        )
    return body


def _failed(target: str, problem: str) -> CertmountError:
    return CertmountError(Reason.API_SERVER_UNAVAILABLE, Fault(target, problem))
