"""How long an issuer can take before a pod gets an interim certificate, and how often nodes then retry."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from csi_driver.authority.issuance import steps
from csi_driver.authority.issuance.steps import InterimCertificates
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import Grant
from csi_driver.core.spec import KeyType
from tests.unit.authority.clock import Clock

ISSUED = IssuedCertificate((b"leaf",), (b"root",))


class SlowIssuer(Issuer):
    """Issues after some seconds."""

    roots, environment = (), ""

    def __init__(self, seconds: float, while_pending: str | None = None) -> None:
        self.while_pending = while_pending
        self._seconds = seconds

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        del request
        await asyncio.sleep(self._seconds)
        return ISSUED


def new_request(namespace: str = "web") -> IssuerRequest:
    pod = PodIdentity(ServiceAccount(namespace, "shop"), "shop-uid", "shop-0", "uid", "node1", "node1-uid", 0.0)
    csr = parse_csr(build_csr(generate_key(KeyType.EC_P256), Names()))
    return IssuerRequest(csr, Grant(Names(), timedelta(hours=1), (), ()), pod)


async def test_only_an_issuer_with_interim_certificates_is_pending_after_the_timeout() -> None:
    assert await InterimCertificates(timeout_s=0.01).issue(SlowIssuer(0.1), new_request()) is ISSUED
    interim = InterimCertificates(timeout_s=0.05)
    assert await interim.issue(SlowIssuer(0, "internal"), new_request()) is ISSUED
    with pytest.raises(CertmountError, match="IssuancePending: certificate: the issuer takes longer than"):
        await interim.issue(SlowIssuer(60, "internal"), new_request())


def test_nodes_retry_older_requests_less_often() -> None:
    clock = Clock(0.0)
    interim, first = InterimCertificates(clock), new_request()

    def seconds(at: float, request: IssuerRequest = first) -> float:
        clock.now = at
        return interim.retry_after(request).total_seconds()

    assert [seconds(at) for at in (0, 15, 60, 120, 200, 300, 3000)] == [15, 15, 15, 30, 50, 60, 60]
    assert seconds(3000, new_request()) == 15
    interim.forget(first)
    assert seconds(3000) == 15
    assert seconds(3000 + 3601) == 15


def test_tenant_cannot_evict_the_interim_certificates_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its share, only the tenant's own requests are retried as seldom as old ones, until its old ones are forgotten."""
    monkeypatch.setattr(steps, "MAX_INTERIM", 12)
    clock = Clock(0.0)
    interim, victim = InterimCertificates(clock), new_request("bank")
    assert interim.retry_after(victim).total_seconds() == 15
    clock.now = 120.0
    seconds = [interim.retry_after(new_request("attacker")).total_seconds() for _ in range(50)]
    assert seconds == [15, 15, *[60] * 48]
    assert interim.retry_after(victim).total_seconds() == 30
    assert interim.retry_after(new_request("shop")).total_seconds() == 15
    clock.now += 3601.0
    assert interim.retry_after(new_request("attacker")).total_seconds() == 15
    assert len(interim._tracked) == interim._shares.total == 1
