"""Sockets that listen on IPv4, IPv6 or both, whatever the host has."""

from __future__ import annotations

import contextlib
import socket

from csi_driver.core.addresses import ALL_HOSTS, Address

BACKLOG = 1024  # connections that wait for accept(2); a probe among many other connections must not be dropped


def listening_socket(address: Address) -> socket.socket:
    """Return a socket that listens on the address; [::] includes IPv4, and is IPv4 on hosts without IPv6. Raises OSError."""
    if address.host == ALL_HOSTS:
        with contextlib.suppress(OSError):
            return _listen(socket.AF_INET6, (ALL_HOSTS, address.port), dual_stack=True)
        address = Address("0.0.0.0", address.port)  # noqa: S104  # as the user asked
    failure: OSError | None = None
    # localhost can have an IPv6 address on a host without IPv6, so use the first address that works.
    host = address.host.encode("ascii")  # a string would import the codec for internationalized names
    for family, _, _, _, resolved in socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM):
        try:
            return _listen(family, resolved, dual_stack=False)
        except OSError as error:
            failure = error
    raise failure or OSError(f"{address.host} has no address")


def _listen(family: int, address: tuple[object, ...], *, dual_stack: bool) -> socket.socket:
    return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=dual_stack)
