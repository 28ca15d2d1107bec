"""ACME certificates for Secrets: accounts by email address, TSIG keys of requests, renewal, HTTP-01, and what the policy refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from csi_driver._proto import authority_pb2
from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme import account as account_module
from csi_driver.authority.issuers.acme.config import Http01
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import SecretIdentity
from csi_driver.core.names import DNSName, EmailAddress, Names
from csi_driver.core.secret import Secret
from tests.integration.authority.world import CallFailure, Controller, failure_of, secrets_world
from tests.peers.acme import (
    AcmeEnvironment,
    acme_environment,
    challenge_server,
    dns_names,
    issue_when_ready,
    leaf,
    request_for,
    running_issuers,
)
from tests.peers.bind9 import KEY, key_source
from tests.peers.processes import LOOPBACK
from tests.support.ports import free_port
from tests.support.tokens import TokenIssuer
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "openssl")

NAME = "shop.example.test"
TSIG_SECRET = "shop/tsigkey"  # a name


def request(
    *names: str, secret: str = "shop/shop-tls", email: str = "", tsig_secret: str = "", key: Any = None
) -> IssuerRequest:
    wanted = request_for(*(names or (NAME,)), key=key)
    assert wanted.requested is not None
    requested = replace(wanted.requested, acme_email=EmailAddress.parse(email) if email else None)
    identity = SecretIdentity.parse(*secret.split("/"))
    return replace(wanted, identity=identity, requested=requested, tsig_secret=tsig_secret)


async def accounts(env: AcmeEnvironment, file: str = "acme.json") -> list[dict[str, Any]]:
    values = (await DirectoryStore(Path(env.configuration.account.directory), file).load()).values
    return [json.loads(value.reveal()) for name, value in values.items() if name.startswith("account-")]


async def test_each_email_address_has_its_own_account_made_on_demand(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        issuer = env.issuer()
        async with running_issuers(issuer):
            for email in ("a@example.test", "b@example.test", "admin@example.test", ""):
                name = f"{email.partition('@')[0] or 'own'}.example.test"
                issued = await issue_when_ready(issuer, request(name, email=email))
                assert dns_names(issued.chain) == {name}
        stored = await accounts(env)
        assert sorted(one["namespace"] for one in stored) == ["", "shop", "shop"]
        assert len({one["url"] for one in stored}) == 3
        replica = env.issuer()
        async with running_issuers(replica):
            await issue_when_ready(replica, request("c.example.test", email="a@example.test"))
        assert await accounts(env) == stored


async def test_accounts_are_limited_by_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_module, "MAX_ACCOUNTS", 6)
    async with acme_environment(tmp_path) as env:
        issuer = env.issuer()
        async with running_issuers(issuer):
            for number in range(3):
                await issue_when_ready(issuer, request(f"n{number}.example.test", email=f"a{number}@example.test"))
            with pytest.raises(CertmountError) as failure:
                await issuer.issue(request("n3.example.test", email="a3@example.test"))
            assert str(failure.value) == (
                "ShareExceeded: namespace shop: holds 3 of 6 ACME accounts of the issuer and requests 1 more, which exceeds "
                f"its share; use an address that has an account, or ask an administrator to remove accounts from {env.store.name}"
            )
            await issue_when_ready(issuer, request("a.bank.example.test", secret="bank/tls", email="x@example.test"))
            await issue_when_ready(issuer, request("again.example.test", email="a0@example.test"))
            assert len(env.ca.orders) == 5


class Secrets:
    """Secrets of the cluster by name, and which were read."""

    def __init__(self, **values: str) -> None:
        self.values = {name.replace("_", "/"): {"key": text} for name, text in values.items()}
        self.read: list[str] = []

    async def __call__(self, namespace: str, name: str) -> Mapping[str, Secret[bytes]]:
        self.read.append(f"{namespace}/{name}")
        return {key: Secret(text.encode()) for key, text in self.values[f"{namespace}/{name}"].items()}


def tsig_text(env: AcmeEnvironment) -> str:
    return Path(key_source(env.directory, KEY).path).read_text().strip()


def tsig_issuer(env: AcmeEnvironment, secrets: Secrets, **changes: Any) -> AcmeIssuer:
    """Return an issuer whose own key is none."""
    configuration = env.with_dns01(**{"key": None, "tsig_secrets": (TSIG_SECRET, "shop/wrong"), **changes})
    return env.issuer(configuration, credentials=CredentialReader(secrets), wait_s=5)


async def test_request_selects_the_tsig_key_in_a_listed_secret(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        secrets = Secrets(
            shop_tsigkey=tsig_text(env), shop_wrong="another:bm90IHRoZSByaWdodCBzZWNyZXQgb2YgaXQ=", bank_key="x"
        )
        issuer = tsig_issuer(env, secrets)
        async with running_issuers(issuer):
            issued = await issue_when_ready(issuer, request(NAME, f"*.{NAME}", tsig_secret=TSIG_SECRET))
            assert dns_names(issued.chain) == {NAME, f"*.{NAME}"}
            assert await env.dns.texts(f"_acme-challenge.{NAME}") == set()
            for tsig_secret, text in (
                ("", "returned REFUSED"),
                ("shop/wrong", "does not know the name of the TSIG key"),
            ):
                with pytest.raises(CertmountError, match=text):
                    await issuer.issue(request("other.example.test", tsig_secret=tsig_secret))
        assert set(secrets.read) == {TSIG_SECRET, "shop/wrong"}
        findings = {one.subject: one for one in await tsig_issuer(env, secrets, zone="example.test").diagnose()}
        assert findings[f"TSIG key of Secret {TSIG_SECRET}"].ok
        assert not findings["TSIG key of Secret shop/wrong"].ok


async def test_tsig_secret_that_is_not_listed_is_refused_and_never_read(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        secrets = Secrets(bank_key=tsig_text(env))
        issuer = tsig_issuer(env, secrets)
        async with running_issuers(issuer):
            with pytest.raises(CertmountError) as failure:
                await issuer.issue(request(tsig_secret="bank/key"))
            expected = "bank/key is not a Secret that the issuer can use; ask an administrator to add it to dns01.tsig_secrets of the issuer"
            assert str(failure.value) == f"NameNotAllowed: tsigSecretName: {expected}"
        http = env.issuer(replace(env.configuration, dns01=None, http01=Http01()))
        with pytest.raises(CertmountError, match="tsigSecretName: the issuer does not use DNS-01; omit it"):
            await http.issue(request(tsig_secret=TSIG_SECRET))
        assert secrets.read == []
        assert env.ca.orders == []


async def test_certificate_of_a_secret_is_renewed_when_the_ca_suggests_it(tmp_path: Path) -> None:
    """A window in the past means: now, for example because the CA revoked it. The order names the certificate that it replaces."""
    async with acme_environment(tmp_path) as env:
        issuer, key = env.issuer(), ec.generate_private_key(ec.SECP256R1())
        async with running_issuers(issuer):
            issued = await issue_when_ready(issuer, request(email="a@example.test", key=key))
            assert issuer.renewals_due() == ()
            await env.ca.set_renewal(leaf(issued.chain), "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")
            later = await issuer._orders.change(_due_now)
            assert len(later.certificates) == 1
            await issuer.renewals.poll()
            assert issuer.renewals_due() == (key_fingerprint(key.public_key()),)
            renewed = await issue_when_ready(issuer, request(email="a@example.test"))
            assert renewed.chain[0] != issued.chain[0]
            assert issuer.renewals_due() == ()
            # Another account cannot replace it; the CA would reject that.
            await env.ca.set_renewal(leaf(renewed.chain), "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")
            await issuer._orders.change(_due_now)
            await issuer.renewals.poll()
            assert len(issuer.renewals_due()) == 1
            assert (await issue_when_ready(issuer, request(email="b@example.test"))).chain


def _due_now(state: Any) -> Any:
    return replace(state, certificates=tuple(replace(one, check_at=0.0) for one in state.certificates))


async def test_http01_works_for_a_secret(tmp_path: Path) -> None:
    port = free_port()
    async with acme_environment(tmp_path, http_port=port) as env:
        http01 = Http01(self_test=f"{LOOPBACK}:{port}")
        issuer = env.issuer(replace(env.configuration, dns01=None, http01=http01))
        async with running_issuers(issuer), challenge_server(issuer, port=port):
            issued = await issue_when_ready(issuer, request(email="a@example.test"))
            assert dns_names(issued.chain) == {NAME}


STORE = "acme-letsencrypt.json"  # of an authority
POLICY = f"""
policy:
- match: {{namespaces: [shop], secrets: ["*"]}}
  allow: {{dns: [{NAME}, "*.{NAME}"], issuers: [internal, letsencrypt], usages: [server], acme_emails: ["*@shop.example.test"]}}
"""


@pytest.fixture
async def env(tmp_path: Path) -> AsyncIterator[AcmeEnvironment]:
    async with acme_environment(tmp_path) as env:
        yield env


@pytest.fixture
async def controller(env: AcmeEnvironment) -> AsyncIterator[Controller]:
    issuer = TokenIssuer()
    file = env.directory / "issuers.json"
    acme = env.declaration() | {"while_pending": "internal", "email": "admin@example.test"}
    file.write_text(json.dumps({"issuers": [{"name": "letsencrypt", "acme": acme}]}))
    world = secrets_world(env.directory, issuer, POLICY, file)
    async with world.running() as server, world.channel() as channel:
        await until(lambda: "letsencrypt" in server._trust.snapshot.sets, "the issuer's roots")
        yield Controller(world, channel)


async def issued(controller: Controller, email: str) -> authority_pb2.IssueResponse:
    csr = build_csr(ec.generate_private_key(ec.SECP256R1()), Names.of([DNSName.parse(NAME)]))
    async with asyncio.timeout(60):
        while True:
            try:
                return await controller.issue(csr=csr, issuer="letsencrypt", email=email)
            except grpc.aio.AioRpcError as error:
                assert "IssuancePending" in (error.details() or "")


async def test_authority_issues_for_a_secret(env: AcmeEnvironment, controller: Controller) -> None:
    """Never an interim certificate, which an ingress controller would serve. The issuer's own address is always allowed."""
    for email in ("ops@shop.example.test", "", "admin@example.test"):
        answer = await issued(controller, email)
        assert dns_names(tuple(answer.chain)) == {NAME}
        assert not answer.interim
        assert list(answer.trust["letsencrypt"].roots) == [await env.ca.root()]
    assert sorted(one["namespace"] for one in await accounts(env, STORE)) == ["", "shop"]
    bundle = await controller.watch().read()
    assert dict(bundle.environments) == {"internal": "internal", "letsencrypt": env.ca.directory_url}


async def test_what_the_policy_refuses_spends_no_order_and_no_account(
    env: AcmeEnvironment, controller: Controller
) -> None:
    refused: list[tuple[list[str], dict[str, Any], str]] = [
        (["bank.example.test"], {}, "bank.example.test: no policy rule allows this name for secret shop/shop-tls"),
        ([NAME], {"namespace": "bank"}, f"{NAME}: no policy rule allows this name for secret bank/shop-tls"),
        ([NAME], {"email": "a@mallory.test"}, "email: a@mallory.test is not the address of an ACME account that policy[0]"),
        ([NAME], {"tsig_secret": "bank/key"}, "tsigSecretName: bank/key is not a Secret that the issuer can use"),
        ([NAME], {"issuer": "internal", "email": "a@shop.example.test"}, "issuer: internal is no ACME issuer; omit email"),
    ]  # fmt: skip

    async def failure(names: list[str], fields: dict[str, Any]) -> CallFailure:
        return await failure_of(controller.issue(*names, **{"issuer": "letsencrypt", **fields}))

    for names, fields, text in refused:
        assert text in (await failure(names, fields)).text
    assert env.ca.orders == []
    assert not any(one["namespace"] for one in await accounts(env, STORE))
