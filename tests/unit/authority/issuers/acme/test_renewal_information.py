"""Renewal information of many certificates (RFC 9773): a certificate without it delays no other one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.authority.issuers.acme.context import OrderStore
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.acme.state import AcmeState
from csi_driver.core.errors import CertmountError
from tests.unit.authority.clock import Clock
from tests.unit.authority.issuers.acme.samples import NOW, certificate
from tests.unit.authority.issuers.acme.test_hostile_ca import HostileCA

IDENTIFIERS = ("first", "second", "third")
DUE = tuple(
    certificate(order_id=one, key_sha256=one, certificate_id=one, check_at=NOW, renew_at=NOW + 60 * 86400)
    for one in IDENTIFIERS
)
WINDOW = {"suggestedWindow": {"start": "2026-01-01T00:00:00Z", "end": "2026-01-02T00:00:00Z"}}
CERTIFICATE_UNKNOWN = {"type": "urn:ietf:params:acme:error:malformed", "detail": "unknown certificate"}


class RecordingCA(HostileCA):
    """Remembers for which certificates it was asked."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.asked: list[str] = []

    async def _respond(self, request: web.Request) -> web.Response:
        if request.path.startswith("/renewalInfo/"):
            self.asked.append(request.path.removeprefix("/renewalInfo/"))
        return await super()._respond(request)


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[RecordingCA]:
    recording = RecordingCA(tmp_path)
    async with recording.running():
        resources = ("newNonce", "newAccount", "newOrder", "renewalInfo")
        recording.bodies["dir"] = {name: f"{recording.url}/{name}" for name in resources}
        for one in IDENTIFIERS:
            recording.bodies[f"renewalInfo/{one}"] = WINDOW
        yield recording


async def _issuer(ca: RecordingCA, clock: Clock) -> AcmeIssuer:
    """Return an issuer with three certificates whose renewal information is due."""
    issuer = replace(ca.issuer(), clock=clock)
    await OrderStore(issuer.store, clock).change(lambda _: AcmeState(certificates=DUE))
    return issuer


@pytest.mark.parametrize(
    "status, body",
    [
        (404, CERTIFICATE_UNKNOWN),
        (404, b"<html></html>"),
        (403, CERTIFICATE_UNKNOWN),
        (200, {}),
        (200, b"<html></html>"),
        (200, {"suggestedWindow": {"start": "tomorrow", "end": 3}}),
    ],
    ids=["404", "404 page", "403", "no window", "page", "invalid window"],
)
async def test_certificate_without_renewal_information_delays_no_other(
    status: int, body: object, ca: RecordingCA
) -> None:
    """A staging certificate after a change of the directory, for instance. The log names it once."""
    ca.status["renewalInfo/first"], ca.bodies["renewalInfo/first"] = status, body
    issuer = await _issuer(ca, Clock(NOW))
    with capture_logs() as logs:
        await issuer.renewals.poll()
    assert sorted(ca.asked) == list(IDENTIFIERS)
    assert sorted(issuer.renewals_due()) == ["second", "third"]
    await issuer.renewals.poll()
    assert len(ca.asked) == 3, "all wait six hours"
    (warning,) = [one for one in logs if one["log_level"] == "warning"]
    assert warning["event"] == "ACME renewal information unavailable"
    assert (warning["count"], warning["certificates"]) == (1, ["first"])


@pytest.mark.parametrize("status", [302, 429, 500, 503])
async def test_ca_that_cannot_answer_now_is_asked_once(status: int, ca: RecordingCA) -> None:
    for one in IDENTIFIERS:
        ca.status[f"renewalInfo/{one}"] = status
    issuer = await _issuer(ca, Clock(NOW))
    with pytest.raises((AcmeProblem, CertmountError)):
        await issuer.renewals.poll()
    assert len(ca.asked) == 1


async def test_certificate_whose_information_the_ca_cannot_return_does_not_stop_the_others_forever(
    ca: RecordingCA,
) -> None:
    ca.status["renewalInfo/first"] = ca.status["renewalInfo/second"] = 500
    clock = Clock(NOW)
    issuer = await _issuer(ca, clock)
    for _ in range(60):
        with contextlib.suppress(AcmeProblem):
            await issuer.renewals.poll()
        clock.forward(7 * 3600.0)
    assert issuer.renewals_due() == ("third",)
