"""HOST:PORT addresses of listeners and servers, for IPv4, IPv6 and both."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import NamedTuple

ALL_HOSTS = "::"
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_BRACKETS = re.compile(r"\[([0-9A-Fa-f:.]+)\]", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}", re.ASCII)


class Address(NamedTuple):
    """A host, without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parse HOST:PORT, where HOST is a name, an IPv4 address or an IPv6 address in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if text.count(":") > 1 and not host.startswith("["):
        raise ValueError("is not HOST:PORT: put an IPv6 address in brackets, as in [::1]:8443")
    if not colon or not host or not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError("is not HOST:PORT, as in authority.example.com:8443, 192.0.2.1:8443 or [2001:db8::1]:8443")
    if host.startswith("["):
        match = _BRACKETS.fullmatch(host)
        with contextlib.suppress(ValueError):
            return Address(str(ipaddress.IPv6Address(match[1] if match else "")), int(port))
        raise ValueError(f"is not HOST:PORT: {host!r} is not an IPv6 address in brackets")
    if not _HOST.fullmatch(host):
        raise ValueError(f"is not HOST:PORT: {host!r} is not a host name or an IP address")
    return Address(host, int(port))


def parse_listen_address(text: str) -> Address:
    """Parse the address of a listener: as :func:`parse_address`, and :PORT for all addresses of the host. Raises ValueError."""
    return parse_address(f"[{ALL_HOSTS}]{text}" if text.startswith(":") and text.count(":") == 1 else text)
