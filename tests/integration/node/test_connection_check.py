"""The connection that ``certmount doctor`` lets each driver make: which problem it names."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from csi_driver.core.errors import CertmountError
from csi_driver.rpc.serving_certificate import check_connection
from tests.support.scripted_authority import ScriptedAuthority, TestCA


@pytest.fixture
async def authority(tmp_path: Path) -> AsyncIterator[ScriptedAuthority]:
    async with ScriptedAuthority(tmp_path) as found:
        yield found


async def failure(address: str, roots: bytes) -> str:
    with pytest.raises(CertmountError) as raised:
        await check_connection(address, roots)
    return str(raised.value)


async def test_addresses_of_the_authority(authority: ScriptedAuthority) -> None:
    assert await check_connection(authority.address, authority.ca.pem) in ("127.0.0.1", "127.0.0.1, ::1", "::1")


async def test_name_that_does_not_resolve(authority: ScriptedAuthority) -> None:
    text = await failure("certmount-authority.invalid:443", authority.ca.pem)
    assert text.startswith("AuthorityUnavailable: certmount-authority.invalid:443: the name does not resolve: ")
    assert text.endswith("; check that the Service exists, and that the cluster's DNS works")


async def test_certificate_of_another_root(authority: ScriptedAuthority) -> None:
    text = await failure(authority.address, TestCA("other root").pem)
    assert text.startswith(f"AuthorityUnavailable: {authority.address}: its certificate is rejected: ")


async def test_certificate_for_another_name(authority: ScriptedAuthority) -> None:
    address = f"127.0.0.1:{authority.address.rpartition(':')[2]}"
    text = await failure(address, authority.ca.pem)
    assert "its certificate is rejected: IP address mismatch" in text


async def test_expired_certificate_is_a_problem_of_the_clocks(tmp_path: Path) -> None:
    authority = ScriptedAuthority(tmp_path)
    authority.ca.ahead = -timedelta(hours=30)
    async with authority:
        assert (await failure(authority.address, authority.ca.pem)).startswith(
            "ClockSkew: the clocks of this node and "
        )


async def test_nothing_listens_and_nothing_answers(authority: ScriptedAuthority) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        text = await failure(address, authority.ca.pem)
    assert text == f"AuthorityUnavailable: {address}: connection refused; check that its pods are ready"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts no connection, so nothing answers
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        text = await failure(address, authority.ca.pem)
    hint = "check that its pods are ready, and the NetworkPolicies"
    assert text == f"AuthorityUnavailable: {address}: no connection within 5 s; {hint}"
