"""The ACME account, its credentials, and diagnostics."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from csi_driver.authority.issuers.acme.config import ExternalAccount
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.errors import Reason
from tests.peers.acme import (
    ZONE,
    AcmeEnvironment,
    acme_environment,
    failure_of,
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


@contextlib.asynccontextmanager
async def external_account(directory: Path, text: str) -> AsyncIterator[AcmeEnvironment]:
    """Configure an account with this key at a CA that requires ``MAC_KEY``."""
    file = directory / "mac"
    file.write_text(text, encoding="ascii")
    async with acme_environment(directory, external_accounts={"customer-1": MAC_KEY}) as env:
        account = ExternalAccount("customer-1", FileSource(str(file)))
        yield replace(env, configuration=replace(env.configuration, external_account=account))


MAC_KEY = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
_DECODED = base64.urlsafe_b64decode(MAC_KEY)


@pytest.mark.parametrize(
    "text, hint",
    [
        (base64.b64encode(MAC_KEY.encode()).decode(), "the key is encoded twice with base64; store the decoded text"),
        (_DECODED.hex(), "the key is hexadecimal; convert it to base64url"),
        ("d3Jvbmc", "the key has only 5 bytes; copy the complete key that the CA shows"),
        (base64.b64encode(bytes(range(200, 248))).decode(), "compare key_id and key with what the CA shows"),
    ],
    ids=["encoded twice", "hexadecimal", "short", "another key"],
)
async def test_rejected_external_account_names_the_key_and_what_was_seen(tmp_path: Path, text: str, hint: str) -> None:
    async with external_account(tmp_path, text) as env:
        error = str(await env.failure(NAME))
        account = f"the account with file {tmp_path / 'mac'} and key_id customer-1: "
        assert f"acme.eab.key: {env.ca.directory_url} rejected {account}" in error
        assert hint in error
        assert text not in error


async def test_missing_or_unreadable_external_account_is_explained(tmp_path: Path) -> None:
    async with external_account(tmp_path, "not base64!") as env:
        missing = await env.failure(NAME, configuration=replace(env.configuration, external_account=None))
        assert "acme.eab: the CA requires an external account" in str(missing)
        unreadable = (
            f"file {tmp_path / 'mac'} is not base64url, the format of MAC keys; copy the key as the CA shows it"
        )
        assert f"acme.eab.key: {unreadable}" in str(await env.failure(NAME))


@pytest.mark.parametrize(
    "text", [MAC_KEY + "\n", base64.b64encode(_DECODED).decode(), f"{MAC_KEY[:20]}\n{MAC_KEY[20:]}\n"],
    ids=["base64url", "base64", "two lines"],
)  # fmt: skip
async def test_every_form_of_the_right_key_is_accepted(tmp_path: Path, text: str) -> None:
    async with external_account(tmp_path, text) as env:
        await env.issue(NAME)


async def test_no_secret_is_in_logs_or_orders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even at debug level of any library."""
    caplog.set_level(logging.DEBUG)
    async with external_account(tmp_path, MAC_KEY) as env:
        issuer = env.issuer()
        with capture_logs() as logs:
            async with running_issuers(issuer):
                await issuer.issue(request_for(NAME))
            assert all(finding.ok for finding in await issuer.diagnose())
        values = (await env.store.load()).values
    (account,) = [json.loads(value.reveal()) for name, value in values.items() if name.startswith("account-")]
    secrets = [MAC_KEY, account["key"]["d"], base64.b64encode(env.dns.key.secret.reveal()).decode("ascii")]
    text = "\n".join([caplog.text, repr(logs), values["orders.json"].reveal().decode("ascii")])
    assert "acme" in caplog.text  # the library logs
    assert not any(secret in text for secret in secrets)


async def test_account_is_registered_again_if_the_ca_lost_it(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        await env.issue(NAME)
    async with env.dns.running(), env.ca.running():
        env.roots_file.write_bytes(await env.ca.root_pem())  # new at each start
        await env.issue(NAME)


async def test_diagnosis_reports_problems_and_creates_no_order(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        good = await env.issuer(env.with_dns01(zone=ZONE)).diagnose()
        assert all(finding.ok for finding in good), good
        assert {"account", "directory", "DNS update", "name servers"} <= {finding.subject for finding in good}
        wrong = replace(env.with_dns01(key=None, zone="elsewhere.test"), profile="nosuch")
        bad = {finding.subject: finding.text for finding in await env.issuer(wrong).diagnose() if not finding.ok}
        assert "not authorized" in bad["DNS update"]
        assert "no profile nosuch" in bad["profile"]
        assert env.ca.orders == []


async def test_unavailable_or_untrusted_ca_is_explained(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        error = await env.failure(NAME, configuration=replace(env.configuration, ca_file=None))
    problem = "the server's certificate is not issued by the configured root; a private CA needs acme.ca"
    assert problem in str(error)
    assert error.reason is Reason.ISSUANCE_PENDING
    (finding, *_) = [one for one in await env.issuer().diagnose() if not one.ok]
    assert "cannot connect" in finding.text
