"""The controller works only with roots of the authority, and its metrics show if it receives none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.rpc.authority_messages import TrustBundle
from tests.integration.secrets.conftest import World
from tests.support.waiting import until

TLS = {"secretName": "mysql-tls", "hosts": ["mysql.example.com"]}


async def test_metric_shows_a_leader_that_the_authority_rejects(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It issues nothing, and has no failure for any Secret."""
    attempts = 0
    accepted = asyncio.Event()
    watch = world.authority.watch_trust

    async def watch_trust() -> AsyncIterator[TrustBundle]:
        nonlocal attempts
        attempts += 1
        if not accepted.is_set():
            raise CertmountError(Reason.TOKEN_REJECTED, "another service account")
        async for bundle in watch():
            yield bundle

    monkeypatch.setattr(world.authority, "watch_trust", watch_trust)
    world.api.ingress("shop", "databases", TLS)
    async with world.running():
        await until(lambda: attempts >= 2, "a second attempt")
        assert world.metric("certmount_secrets_leader") == 1
        assert world.metric("certmount_secrets_trust_stream_connected") == 0
        assert not world.authority.requests
        accepted.set()
        await world.until_secret("shop/mysql-tls")
        assert world.metric("certmount_secrets_trust_stream_connected") == 1
    assert world.metric("certmount_secrets_leader") == 0
    assert world.metric("certmount_secrets_trust_stream_connected") == 0
