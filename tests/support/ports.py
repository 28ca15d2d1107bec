"""Ports for the servers that tests start."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import socket

# Below NodePorts (30000) and the ephemeral range of Linux (32768), so that neither a test cluster nor a client connection of
# another test takes a port before its server does.
_FIRST, _PER_PROCESS, _RANGES = 16_000, 200, 70


@functools.cache
def _own_ports() -> tuple[socket.socket, itertools.cycle[int]]:
    """Reserve a range: until this process ends, no other one on the machine can bind the abstract socket of that range."""
    for number in random.sample(range(_RANGES), _RANGES):
        reservation = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            reservation.bind(f"\0certmount-test-ports-{number}")
            first = _FIRST + number * _PER_PROCESS
            return reservation, itertools.cycle(range(first, first + _PER_PROCESS))
        reservation.close()
    raise OSError("all ranges of ports are reserved by other processes")


def free_port() -> int:
    """Return a loopback port that is free for TCP and UDP, and that no other process of any test run returns."""
    for port in itertools.islice(_own_ports()[1], _PER_PROCESS):
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            tcp.bind(("127.0.0.1", port))
            udp.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def interface_address() -> str:
    """Return an IPv4 address of this machine that is not a loopback address; empty if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        try:
            udp.connect(("192.0.2.1", 9))  # chooses the address, and sends nothing
        except OSError:
            return ""
        return str(udp.getsockname()[0])
