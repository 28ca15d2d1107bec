"""The ACME account, its credentials, and diagnostics."""

from __future__ import annotations

import base64
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from csi_driver.authority.issuers.acme.config import AcmeConfiguration, ExternalAccount
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.errors import Reason
from tests.peers.acme import (
    ZONE,
    acme_environment,
    dns_configuration,
    dns_names,
    failure_of,
    issue_when_ready,
    request_for,
    running_issuers,
)
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "openssl")

NAME = "shop.example.test"


async def test_account_requires_agreement_to_the_terms(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        issuer = env.issuer(replace(env.configuration, terms_agreed=False), wait_s=2)
        async with running_issuers(issuer):
            error = str(await failure_of(issuer, request_for(NAME)))
            assert "acme.terms_agreed" in error
            assert "data:text/plain" in error
            await until(lambda: "terms" in (issuer.problem or ""), "the problem")
        assert env.ca.orders == []


async def test_external_account_requires_the_right_key(tmp_path: Path) -> None:
    secret = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    async with acme_environment(tmp_path, external_accounts={"customer-1": secret}) as env:
        right, wrong = tmp_path / "right", tmp_path / "wrong"
        right.write_text(secret + "\n", encoding="ascii")
        wrong.write_text("d3Jvbmc", encoding="ascii")
        bad = ExternalAccount("customer-1", FileSource(str(wrong)))
        for account, text in ((None, "acme.eab"), (bad, "rejected the account")):
            issuer = env.issuer(replace(env.configuration, external_account=account), wait_s=2)
            async with running_issuers(issuer):
                assert text in str(await failure_of(issuer, request_for(NAME)))
        account = ExternalAccount("customer-1", FileSource(str(right)))
        issuer = env.issuer(replace(env.configuration, external_account=account))
        async with running_issuers(issuer):
            issued = await issue_when_ready(issuer, request_for("b.example.test"))
            assert dns_names(issued.chain) == {"b.example.test"}


async def test_no_secret_is_in_logs_or_orders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even at debug level of any library."""
    caplog.set_level(logging.DEBUG)
    mac_key, file = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W", tmp_path / "mac"
    file.write_text(mac_key, encoding="ascii")
    async with acme_environment(tmp_path, external_accounts={"customer-1": mac_key}) as env:
        external = ExternalAccount("customer-1", FileSource(str(file)))
        issuer = env.issuer(replace(env.configuration, external_account=external))
        with capture_logs() as logs:
            async with running_issuers(issuer):
                await issuer.issue(request_for(NAME))
            assert all(finding.ok for finding in await issuer.diagnose())
        values = (await env.store.load()).values
    (account,) = [json.loads(value.reveal()) for name, value in values.items() if name.startswith("account-")]
    secrets = [mac_key, account["key"]["d"], base64.b64encode(env.dns.key.secret.reveal()).decode("ascii")]
    text = "\n".join([caplog.text, repr(logs), values["orders.json"].reveal().decode("ascii")])
    assert "acme" in caplog.text  # the library logs
    assert not any(secret in text for secret in secrets)


async def test_account_is_registered_again_if_the_ca_lost_it(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        issuer = env.issuer()
        async with running_issuers(issuer):
            await issuer.issue(request_for(NAME))
        ca = env.ca
        server = env.dns
    async with server.running(), ca.running():
        env.roots_file.write_bytes(await ca.root_pem())  # new at each start
        issuer = env.issuer()
        async with running_issuers(issuer):
            assert dns_names((await issuer.issue(request_for(NAME))).chain) == {NAME}


async def test_diagnosis_reports_problems_and_creates_no_order(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        zoned: AcmeConfiguration = replace(env.configuration, dns01=dns_configuration(env.dns, zone=ZONE))
        good = await env.issuer(zoned).diagnose()
        assert all(finding.ok for finding in good), good
        assert {"account", "directory", "DNS update", "name servers"} <= {finding.subject for finding in good}
        assert zoned.dns01 is not None
        wrong = replace(zoned, profile="nosuch", dns01=replace(zoned.dns01, key=None, zone="elsewhere.test"))
        bad = {finding.subject: finding.text for finding in await env.issuer(wrong).diagnose() if not finding.ok}
        assert "not authorized" in bad["DNS update"]
        assert "no profile nosuch" in bad["profile"]
        assert env.ca.orders == []


async def test_unavailable_or_untrusted_ca_is_explained(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        untrusted = env.issuer(replace(env.configuration, ca_file=None), wait_s=2)
        async with running_issuers(untrusted):
            error = await failure_of(untrusted, request_for(NAME))
            assert "untrusted TLS certificate" in str(error)
            assert error.reason is Reason.ISSUANCE_PENDING
    (finding, *_) = [one for one in await env.issuer().diagnose() if not one.ok]
    assert "cannot be reached" in finding.text
