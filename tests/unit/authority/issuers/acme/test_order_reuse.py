"""Pods on several nodes with the same names, and so several keys, at a CA that reuses orders, as Let's Encrypt does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme import order_rules, order_shares
from csi_driver.authority.issuers.acme.context import OrderStore
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.core.backoff import Backoff
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import Reason
from tests.peers.acme import failure_of, issue_when_ready, leaf, request_for, running_issuers
from tests.support.waiting import until
from tests.unit.authority.issuers.acme.reusing_ca import ReusingCA

NAME = "shop.example.test"


@pytest.fixture
async def ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ReusingCA]:
    monkeypatch.setattr(order_rules, "_RETRY", Backoff(0.1, 0.5))
    async with ReusingCA(tmp_path).running() as running:
        yield running


async def _issue(issuer: AcmeIssuer, request: IssuerRequest) -> None:
    issued = await issue_when_ready(issuer, request)
    assert public_bytes(leaf(issued.chain).public_key()) == public_bytes(request.csr.public_key)  # type: ignore[arg-type]  # all keys have this method


async def test_nodes_with_the_same_names_each_get_a_certificate_from_their_own_order(ca: ReusingCA) -> None:
    replicas = ca.issuer(), ca.issuer()
    async with running_issuers(*replicas), asyncio.timeout(30):
        await asyncio.gather(*(_issue(replicas[number % 2], request_for(NAME)) for number in range(3)))
    assert [one.status for one in ca.orders] == ["valid"] * 3
    assert ca.new_orders == 3


async def test_certificate_beyond_the_share_of_tracked_certificates_is_ordered_once(
    ca: ReusingCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node decides when to renew it."""
    monkeypatch.setattr(order_shares, "MAX_CERTIFICATE_BYTES", 0)
    issuer, request = ca.issuer(), request_for(NAME)
    async with running_issuers(issuer):
        issued = await issue_when_ready(issuer, request)
        assert issued.renew_after is None
        assert await issue_when_ready(issuer, request) == issued
    assert ca.new_orders == 1


async def test_order_that_another_key_finalized_is_replaced_by_a_new_one(ca: ReusingCA) -> None:
    """Another program that uses the account can finalize it, too, and is not in the issuer's state."""
    issuer, request = ca.issuer(), request_for(NAME)
    async with running_issuers(issuer), asyncio.timeout(30):
        issuing = asyncio.ensure_future(_issue(issuer, request))
        await until(lambda: ca.orders, "the order")
        ca.finalize(0, request_for(NAME).csr.der)
        await issuing
    assert [one.status for one in ca.orders] == ["valid"] * 2


async def test_rejected_names_are_not_ordered_again_for_the_other_nodes(ca: ReusingCA) -> None:
    """They wait as long as the node whose order failed, and their errors contain the CA's reason."""
    ca.reject_orders = "unauthorized"
    issuer = ca.issuer()
    async with running_issuers(issuer), asyncio.timeout(30):
        errors = await asyncio.gather(*(failure_of(issuer, request_for(NAME)) for _ in range(3)))
        assert ca.new_orders == 1
    assert {error.reason for error in errors} == {Reason.ISSUER_UNAVAILABLE}
    assert all("no such record (unauthorized); the authority retries after" in str(error) for error in errors)
    state = await OrderStore(ca.store, lambda: 0.0).read(0.0)
    assert state.orders == ()
    assert [one.failures for one in state.backoffs] == [1]
