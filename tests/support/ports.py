"""Ports for the servers that tests start."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket

# Below the ephemeral range of Linux (32768), so that no client connection of another test takes a port before its server does.
_FIRST, _PER_WORKER = 16_000, 1_000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
_offsets = itertools.count(random.randrange(_PER_WORKER))  # noqa: S311  # several runs on one machine seldom meet


def free_port() -> int:
    """Return a loopback port that is free for TCP and UDP, and that no other worker of this test run uses."""
    for offset in itertools.islice(_offsets, _PER_WORKER):
        port = _FIRST + _WORKER * _PER_WORKER + offset % _PER_WORKER
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            tcp.bind(("127.0.0.1", port))
            udp.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")
