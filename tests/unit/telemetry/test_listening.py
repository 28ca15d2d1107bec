"""Listeners on hosts with and without IPv6."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from csi_driver.core.addresses import Address
from csi_driver.telemetry.listening import listening_socket


def test_all_addresses_include_ipv4() -> None:
    with listening_socket(Address("::", 0)) as listening:
        port = listening.getsockname()[1]
        for host in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
            socket.create_connection((host, port), 5).close()


def test_all_addresses_are_ipv4_on_a_kernel_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Localhost too, although its first address is ::1."""
    original = socket.create_server

    def create_server(address: Any, *, family: int, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return original(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", create_server)
    found = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    with listening_socket(Address("::", 0)) as listening:
        assert listening.getsockname()[0] == "0.0.0.0"  # noqa: S104
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listening_socket(Address("localhost", 0)) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[:1])
    with pytest.raises(OSError, match="not supported"):
        listening_socket(Address("localhost", 0))
