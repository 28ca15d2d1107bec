"""How soon an issuer must answer where something may stand in, and how often its order is asked for."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from csi_driver.authority.issuance.interim import InterimCertificates, while_pending
from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import Grant
from csi_driver.core.spec import KeyType

ISSUED = IssuedCertificate((b"leaf",), (b"root",))


class Clock:
    """Stands still until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Issuer:
    """Answers after a while; most issuers say nothing of stand-ins."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def issue(self, _order: IssuerRequest) -> IssuedCertificate:
        await asyncio.sleep(self._seconds)
        return ISSUED


class Deferring(Issuer):
    """Has the internal CA stand in."""

    while_pending = "internal"


def _order() -> IssuerRequest:
    account = ServiceAccount("web", "shop")
    pod = PodIdentity(account, "shop-uid", "shop-0", "uid", "node1", "node1-uid", 0.0)
    request = parse_csr(build_csr(generate_key(KeyType.EC_P256), Names()))
    return IssuerRequest(request, Grant(Names(), timedelta(hours=1), (), ()), pod)


async def test_an_issuer_that_nothing_stands_in_for_is_waited_for() -> None:
    """As long as it takes."""
    assert while_pending(Issuer(0)) is None
    assert await InterimCertificates(at_once_s=0.01).issued_soon(Issuer(0.1), _order()) is ISSUED


async def test_an_issuer_that_may_be_stood_in_for_must_answer_soon() -> None:
    """Else its order is pending: the pod is to start at once."""
    stand_ins = InterimCertificates(at_once_s=0.05)
    assert await stand_ins.issued_soon(Deferring(0), _order()) is ISSUED
    with pytest.raises(CertmountError, match="takes longer than") as failure:
        await stand_ins.issued_soon(Deferring(60), _order())
    assert failure.value.reason is Reason.ISSUANCE_PENDING


def test_old_orders_are_asked_for_less_often() -> None:
    """From 15 seconds to a minute; an order that has ended, or was not asked for in an hour, begins anew."""
    clock = Clock()
    stand_ins, order = InterimCertificates(clock), _order()

    def seconds() -> float:
        return stand_ins.ask_again_after(order).total_seconds()

    asked = []
    for clock.now in (0.0, 15.0, 60.0, 120.0, 200.0, 300.0, 3000.0):
        asked.append(seconds())
    assert asked == [15, 15, 15, 30, 50, 60, 60]
    assert stand_ins.ask_again_after(_order()) == timedelta(seconds=15)
    stand_ins.over(order)
    assert seconds() == 15
    clock.now += 3601
    assert seconds() == 15
