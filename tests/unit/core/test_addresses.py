"""Addresses of listeners and servers."""

from __future__ import annotations

import pytest

from csi_driver.core.addresses import parse_address, parse_listen_address


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("authority.example.com:443", "authority.example.com", 443),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("[::1]:65535", "::1", 65535),
        ("[2001:DB8:0::1]:8443", "2001:db8::1", 8443),
    ],
)
def test_address_has_a_host_without_brackets(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == (host, port)
    assert parse_address(str(address)) == address


def test_listener_without_a_host_listens_on_all_addresses() -> None:
    assert str(parse_listen_address(":8443")) == "[::]:8443"
    assert str(parse_listen_address("0.0.0.0:8443")) == "0.0.0.0:8443"
    with pytest.raises(ValueError, match=r"^is not HOST:PORT, as in"):
        parse_address(":8443")


FORM = "is not HOST:PORT, as in authority.example.com:8443, 192.0.2.1:8443 or [2001:db8::1]:8443"
BRACKETS = "is not HOST:PORT: put an IPv6 address in brackets, as in [::1]:8443"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", FORM),
        ("8443", FORM),
        ("host", FORM),
        ("host:", FORM),
        ("host:http", FORM),
        ("host:65536", FORM),
        ("host:-1", FORM),
        ("host:8\u0664", FORM),
        ("::1", BRACKETS),
        ("::1:8443", BRACKETS),
        (":::8443", BRACKETS),
        ("https://host:8443", BRACKETS),
        ("[::1]", FORM),
        ("[::1:8443", "is not HOST:PORT: '[::1' is not an IPv6 address in brackets"),
        ("[192.0.2.1]:8443", "is not HOST:PORT: '[192.0.2.1]' is not an IPv6 address in brackets"),
        ("[]:8443", "is not HOST:PORT: '[]' is not an IPv6 address in brackets"),
        ("[::1%lo\n]:8443", "is not HOST:PORT: '[::1%lo\\n]' is not an IPv6 address in brackets"),
        ("my host:8443", "is not HOST:PORT: 'my host' is not a host name or an IP address"),
        ("host/path:8443", "is not HOST:PORT: 'host/path' is not a host name or an IP address"),
    ],
)
def test_invalid_address_is_explained(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r"^is not HOST:PORT") as failure:
        parse_listen_address(text)
    assert str(failure.value) == problem
