"""How long an issuer can take before a pod gets an interim certificate, and how often nodes then retry."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from csi_driver.authority.issuance.steps import InterimCertificates
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.core.certificates.csr import ParsedCSR, build_csr, parse_csr
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

    roots = ()

    def __init__(self, seconds: float, while_pending: str | None = None) -> None:
        self.while_pending = while_pending
        self._seconds = seconds

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        del request
        await asyncio.sleep(self._seconds)
        return ISSUED


def csr() -> ParsedCSR:
    return parse_csr(build_csr(generate_key(KeyType.EC_P256), Names()))


@pytest.fixture
def request_() -> IssuerRequest:
    pod = PodIdentity(ServiceAccount("web", "shop"), "shop-uid", "shop-0", "uid", "node1", "node1-uid", 0.0)
    return IssuerRequest(csr(), Grant(Names(), timedelta(hours=1), (), ()), pod)


async def test_issuer_without_interim_certificates_has_no_timeout(request_: IssuerRequest) -> None:
    assert await InterimCertificates(timeout_s=0.01).issue(SlowIssuer(0.1), request_) is ISSUED


async def test_issuer_with_interim_certificates_is_pending_after_the_timeout(request_: IssuerRequest) -> None:
    interim = InterimCertificates(timeout_s=0.05)
    assert await interim.issue(SlowIssuer(0, "internal"), request_) is ISSUED
    with pytest.raises(CertmountError, match="IssuancePending: certificate: the issuer takes longer than"):
        await interim.issue(SlowIssuer(60, "internal"), request_)


def test_nodes_retry_older_requests_less_often() -> None:
    clock = Clock(0.0)
    interim, first = InterimCertificates(clock), csr()

    def seconds(at: float, request: ParsedCSR = first) -> float:
        clock.now = at
        return interim.retry_after(request).total_seconds()

    assert [seconds(at) for at in (0, 15, 60, 120, 200, 300, 3000)] == [15, 15, 15, 30, 50, 60, 60]
    assert seconds(3000, csr()) == 15
    interim.forget(first)
    assert seconds(3000) == 15
    assert seconds(3000 + 3601) == 15
