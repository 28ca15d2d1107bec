"""Orders that take their time, outlive their replica, are refused or limited: exactly one for each key and names."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import NameOID
from kubernetes.aio import client
from structlog.testing import capture_logs

from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.acme.settings import AcmeSettings, ExternalAccount
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.client import ObjectName, connect
from csi_driver.kube.secret_store import SecretStore
from tests.peers.acme import ZONE, Site, at_work, dns_names, dns_settings, leaf, order_for, patiently, site, told
from tests.peers.acme_replica import described
from tests.peers.bind9 import bind9
from tests.peers.limiting_proxy import LimitingProxy
from tests.support.waiting import until
from tests.unit.kube.api_server import FakeApiServer

pytestmark = pytest.mark.peers("pebble", "named", "openssl")

NAME = "shop.example.test"
CHALLENGE = f"_acme-challenge.{NAME}"


@dataclass
class Ahead:
    """The clock, and by how much it is ahead."""

    by_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.by_s


async def _texts(one: Site) -> set[str]:
    return await one.dns.texts(CHALLENGE)


async def test_nonces_that_are_refused(tmp_path: Path) -> None:
    """A CA that refuses three good nonces of ten is asked again, and signs by one order."""
    async with site(tmp_path, nonce_reject=30) as one:
        issuer = one.issuer()
        async with at_work(issuer):
            issued = await issuer.issue(order_for(NAME, "*.example.test"))
        assert dns_names(issued.chain) == {NAME, "*.example.test"}
        assert len(one.ca.orders) == 1


async def test_a_slow_order(tmp_path: Path) -> None:
    """An order that outlasts the node's calls is one order, however often the node asks; each call ends in time and says that it is pending."""
    async with site(tmp_path, retry_after_s=6) as one:
        issuer = one.issuer(patience_s=0.5)
        order, refusals, issued = order_for(NAME), 0, None
        async with at_work(issuer):
            while issued is None:
                begun = time.monotonic()
                try:
                    issued = await issuer.issue(order)
                except CertmountError as error:
                    assert error.reason is Reason.ISSUANCE_PENDING
                    assert time.monotonic() - begun < 30
                    refusals += 1
        assert refusals >= 5
        assert dns_names(issued.chain) == {NAME}
        assert len(one.ca.orders) == 1
        assert len(one.ca.issued) == 1


async def test_the_same_question_again(tmp_path: Path) -> None:
    """Whoever asks again with the same key and names is given the same certificate; another key is another order."""
    async with site(tmp_path) as one:
        issuer, other = one.issuer(), one.issuer()
        order = order_for(NAME)
        async with at_work(issuer, other):
            first, second, third = await asyncio.gather(issuer.issue(order), issuer.issue(order), other.issue(order))
            assert first.chain == second.chain == third.chain
            assert len(one.ca.orders) == 1
            assert (await issuer.issue(order_for(NAME))).chain != first.chain
        assert len(one.ca.orders) == 2


async def test_a_replica_killed_in_mid_order(tmp_path: Path) -> None:
    """What a replica began that died without a word, another finishes, by the same order; no record is left in DNS."""
    silent = bind9(tmp_path / "silent", {"other.test": ""})
    async with site(tmp_path) as one, silent.running():
        # The first replica waits for a server that never shows the record: so it dies between adding it and the CA's look.
        stuck = replace(one.settings, dns01=dns_settings(one.dns, nameservers=(silent.address,)))
        file = tmp_path / "replica.json"
        file.write_text(described(stuck, lease_s=2), encoding="utf-8")
        doomed = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.peers.acme_replica", str(file))
        issuer = one.issuer(lease_s=2)
        asking = asyncio.ensure_future(issuer.issue(order_for(NAME)))
        try:
            deadline = time.monotonic() + 30
            while not await _texts(one):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        finally:
            os.kill(doomed.pid, signal.SIGKILL)
            await doomed.wait()
        async with at_work(issuer):
            issued = await asking
            assert dns_names(issued.chain) == {NAME}
            assert await _texts(one) == set()
        assert len(one.ca.orders) == 1


async def test_a_replica_that_leaves(tmp_path: Path) -> None:
    """A replica that is stopped gives its orders back, and another goes on at once, long before a lease would end."""
    async with site(tmp_path, retry_after_s=2) as one:
        leaving, staying = one.issuer(lease_s=600), one.issuer(lease_s=600)
        order = order_for(NAME)
        asking = asyncio.ensure_future(staying.issue(order))
        async with at_work(leaving):
            await until(lambda: one.ca.validations, "the CA to look")
        assert not asking.done()
        async with at_work(staying):
            assert dns_names((await asyncio.wait_for(asking, 20)).chain) == {NAME}
        assert len(one.ca.orders) == 1
        async with at_work(leaving):  # it can come back
            assert dns_names((await leaving.issue(order_for("b.example.test"))).chain) == {"b.example.test"}


async def test_state_in_a_secret(tmp_path: Path) -> None:
    """In a cluster two replicas share a Secret, whose changes by others cost no order; the account is one."""
    server = FakeApiServer()
    async with (
        site(tmp_path) as one,
        server.running(),
        connect(client.Configuration(host=server.url)) as api,
    ):
        secret = ObjectName("Secret", "certmount", "certmount-ca")
        replicas = [AcmeIssuer("letsencrypt", one.settings, SecretStore(api, secret)) for _ in range(2)]
        server.before_put += ["secrets/certmount-ca"] * 3
        async with at_work(*replicas):
            orders = [order_for(f"{number}.example.test") for number in range(4)]
            issued = await asyncio.gather(*(replicas[index % 2].issue(order) for index, order in enumerate(orders)))
        assert [dns_names(each.chain) for each in issued] == [{f"{number}.example.test"} for number in range(4)]
        assert len(one.ca.orders) == 4
        assert "There are now 1 accounts in memory" in (one.ca.folder / "pebble.log").read_text(encoding="utf-8")
        assert "There are now 2 accounts" not in (one.ca.folder / "pebble.log").read_text(encoding="utf-8")


async def test_a_store_that_is_away(tmp_path: Path) -> None:
    """While the API server does not answer nothing new is ordered and the issuer says why; what was ordered goes on when it is back."""
    server = FakeApiServer()
    async with (
        site(tmp_path, retry_after_s=2) as one,
        server.running(),
        connect(client.Configuration(host=server.url)) as api,
    ):
        secret = ObjectName("Secret", "certmount", "certmount-ca")
        issuer = AcmeIssuer("letsencrypt", one.settings, SecretStore(api, secret), lease_s=4)
        order = order_for(NAME)
        async with at_work(issuer):
            asking = asyncio.ensure_future(issuer.issue(order))
            await until(lambda: one.ca.validations, "the CA to look")
            server.fail = (500, b"{}")
            await until(lambda: issuer.problem, "the issuer to say so")
            assert "API server" in (issuer.problem or "")
            with pytest.raises(CertmountError) as refusal:
                await asking
            assert refusal.value.reason is Reason.ISSUER_UNAVAILABLE
            server.fail = None
            assert dns_names((await patiently(issuer, order)).chain) == {NAME}
            await until(lambda: issuer.problem is None, "the issuer to be well")
        assert len(one.ca.orders) == 1


async def test_what_a_failed_order_has_left_behind(tmp_path: Path) -> None:
    """Records are removed also of an order that has failed, and once the DNS server is back also those it could not remove then."""
    server = bind9(tmp_path / "dns", {ZONE: ""})
    async with site(tmp_path, server) as one:
        # The CA asks a server that knows nothing: its validation fails.
        ignorant = bind9(tmp_path / "ignorant", {ZONE: ""})
        ca = replace(one.ca, folder=tmp_path / "ca2", dns=ignorant.address)
    async with ignorant.running(), ca.running():
        issuer = one.issuer(replace(one.settings, ca_file=ca.ca_file))
        async with at_work(issuer):
            async with server.running():
                asking = asyncio.ensure_future(issuer.issue(order_for(NAME)))
                await until(lambda: ca.validations, "the CA to look")
            with pytest.raises(CertmountError, match="No TXT records found") as refusal:
                await asking
            assert refusal.value.reason is Reason.ISSUER_UNAVAILABLE
            async with server.running():
                assert await server.texts(CHALLENGE)
                deadline = time.monotonic() + 40
                while await server.texts(CHALLENGE):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.1)


async def test_a_failed_order_is_not_repeated_at_once(tmp_path: Path) -> None:
    """After the CA has refused a proof it is not asked again for minutes, also not with another key or by another replica; then it is."""
    ignorant = bind9(tmp_path / "ignorant", {ZONE: ""})
    server = bind9(tmp_path / "dns", {ZONE: ""})
    async with ignorant.running(), site(tmp_path, server) as one:
        clock = Ahead()
        settings = replace(one.settings, dns01=dns_settings(ignorant))
        issuer = one.issuer(settings, clock=clock)
        async with at_work(issuer):
            with pytest.raises(CertmountError, match="it is asked again after") as first:
                await issuer.issue(order_for(NAME))
            assert first.value.reason is Reason.ISSUER_UNAVAILABLE
        other = one.issuer(clock=clock)
        async with at_work(other):
            with pytest.raises(CertmountError, match="it is asked again after"):
                await other.issue(order_for(NAME))
            assert len(one.ca.orders) == 1
            clock.by_s = 301
            assert dns_names((await other.issue(order_for(NAME))).chain) == {NAME}


@pytest.mark.parametrize("dated", [False, True], ids=["seconds", "date"])
async def test_a_limit_is_obeyed(tmp_path: Path, dated: bool) -> None:
    """A limit that the CA names is told with its time, and obeyed for these names: until then it is refused here, unasked."""
    async with site(tmp_path) as one:
        proxy = LimitingProxy(one.ca, status=429)
        if dated:
            proxy.retry_after = f"{datetime.now(UTC) + timedelta(hours=2):%a, %d %b %Y %H:%M:%S GMT}"
        clock = Ahead()
        async with proxy.running():
            issuer = one.issuer(replace(one.settings, directory=proxy.directory), clock=clock)
            async with at_work(issuer):
                for _ in range(3):
                    with pytest.raises(CertmountError, match="too many certificates") as refusal:
                        await issuer.issue(order_for(NAME))
                    assert refusal.value.reason is Reason.TOO_MANY_REQUESTS
                    hour = datetime.fromtimestamp(clock() + 7200, UTC)
                    assert f"it is asked again after {hour:%Y-%m-%dT%H:}" in str(refusal.value)
                assert proxy.asked == 1
                proxy.status = 0
                assert dns_names((await issuer.issue(order_for("other.example.test"))).chain) == {"other.example.test"}
                clock.by_s = 7205
                assert dns_names((await issuer.issue(order_for(NAME))).chain) == {NAME}
        assert len(one.ca.orders) == 2


async def test_a_busy_ca(tmp_path: Path) -> None:
    """A CA that says it is busy is left alone for as long as it asks; the order waits and goes on by itself."""
    async with site(tmp_path) as one:
        proxy = LimitingProxy(one.ca, status=503, retry_after="3", detail="service busy")
        async with proxy.running():
            issuer = one.issuer(replace(one.settings, directory=proxy.directory), patience_s=2)
            order = order_for(NAME)
            async with at_work(issuer):
                refusal = await told(issuer, order)
                assert "service busy" in str(refusal)
                assert refusal.reason is Reason.ISSUANCE_PENDING
                proxy.status = 0
                assert dns_names((await patiently(issuer, order)).chain) == {NAME}
        assert proxy.asked == 2


async def test_renewal_as_the_ca_advises(tmp_path: Path) -> None:
    """The CA's window decides on renewal; when the CA moves it to now, the certificate is due, and its successor says whom it replaces."""
    async with site(tmp_path) as one:
        clock = Ahead()
        issuer = one.issuer(clock=clock)
        order = order_for(NAME)
        async with at_work(issuer):
            issued = await issuer.issue(order)
            assert issued.renew_after is not None
            assert timedelta(days=50) < issued.renew_after < timedelta(days=89)
            assert issuer.due() == ()
            yesterday, now = datetime.now(UTC) - timedelta(days=1), datetime.now(UTC)
            await one.ca.set_renewal(leaf(issued.chain), f"{yesterday:%Y-%m-%dT%H:%M:%SZ}", f"{now:%Y-%m-%dT%H:%M:%SZ}")
            clock.by_s = 7 * 3600  # the CA has asked not to be asked for six hours
            await issuer.renewals.look()
            assert len(issuer.due()) == 1
            successor = await issuer.issue(order)
            assert successor.chain != issued.chain
            assert issuer.due() == ()
        assert "is a replacement of" in (one.ca.folder / "pebble.log").read_text(encoding="utf-8")


async def test_no_advice(tmp_path: Path) -> None:
    """A short-lived certificate, by a profile: renewed at two thirds of its life at the latest."""
    profiles = {name: {"description": "", "validityPeriod": 90 * 86400} for name in ("default",)}
    profiles["shortlived"] = {"description": "", "validityPeriod": 6 * 86400}
    async with site(tmp_path, profiles=profiles) as one:
        issuer = one.issuer(replace(one.settings, profile="shortlived"))
        async with at_work(issuer):
            issued = await issuer.issue(order_for(NAME))
        certificate = leaf(issued.chain)
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert timedelta(days=5) < life < timedelta(days=7)
        assert issued.renew_after is not None
        assert issued.renew_after < life


async def test_the_preferred_chain(tmp_path: Path) -> None:
    """Of the chains that the CA offers the one is taken whose root has the preferred name."""
    async with site(tmp_path, environment={"PEBBLE_ALTERNATE_ROOTS": "1"}) as one:
        names = {}
        for preferred in (None, "Nobody"):
            issuer = one.issuer(replace(one.settings, preferred_chain=preferred))
            async with at_work(issuer):
                names[preferred] = _top((await issuer.issue(order_for(NAME))).chain)
        assert names[None] == names["Nobody"]
        other = await one.ca.root(1)
        one.roots_file.write_bytes(await one.ca.root_pem() + await one.ca.root_pem(1))
        preferred = _subject(other)
        issuer = one.issuer(replace(one.settings, preferred_chain=preferred))
        async with at_work(issuer):
            assert _top((await issuer.issue(order_for(NAME))).chain) == preferred != names[None]


async def test_a_chain_that_leads_elsewhere(tmp_path: Path) -> None:
    """A chain that does not end at the roots of the configuration is not given to a pod; with the roots put right the same certificate is."""
    async with site(tmp_path, environment={"PEBBLE_ALTERNATE_ROOTS": "1"}) as one:
        one.roots_file.write_bytes(await one.ca.root_pem(1))
        issuer, order = one.issuer(), order_for(NAME)
        async with at_work(issuer):
            with pytest.raises(CertmountError, match="leads to CN=Pebble Root") as refusal:
                await issuer.issue(order)
            assert refusal.value.reason is Reason.ISSUER_UNAVAILABLE
            one.roots_file.write_bytes(await one.ca.root_pem())
            assert dns_names((await issuer.issue(order)).chain) == {NAME}
        assert len(one.ca.orders) == 1


async def test_terms_that_nobody_has_agreed_to(tmp_path: Path) -> None:
    """Without the administrator's word no account is made; what is missing is said, with where the terms are."""
    async with site(tmp_path) as one:
        issuer = one.issuer(replace(one.settings, terms_agreed=False), patience_s=2)
        async with at_work(issuer):
            refusal = str(await told(issuer, order_for(NAME)))
            assert "acme.terms_agreed" in refusal
            assert "data:text/plain" in refusal
            await until(lambda: "terms" in (issuer.problem or ""), "the issuer to say so")
        assert one.ca.orders == []


async def test_an_external_account(tmp_path: Path) -> None:
    """Where the CA binds accounts to its customers, the right key makes one; a wrong key, or none, is said to be it."""
    secret = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    async with site(tmp_path, external_accounts={"customer-1": secret}) as one:
        right, wrong = tmp_path / "right", tmp_path / "wrong"
        right.write_text(secret + "\n", encoding="ascii")
        wrong.write_text("d3Jvbmc", encoding="ascii")
        bad = ExternalAccount("customer-1", FileSource(str(wrong)))
        for account, words in ((None, "acme.eab"), (bad, "refuses it")):
            issuer = one.issuer(replace(one.settings, external_account=account), patience_s=2)
            async with at_work(issuer):
                assert words in str(await told(issuer, order_for(NAME)))
        issuer = one.issuer(
            replace(one.settings, external_account=ExternalAccount("customer-1", FileSource(str(right))))
        )
        async with at_work(issuer):
            assert dns_names((await patiently(issuer, order_for("b.example.test"))).chain) == {"b.example.test"}


async def test_no_secret_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither TSIG key nor MAC key nor the account's own is in any log, at the finest level and of any library, nor among the orders."""
    caplog.set_level(logging.DEBUG)
    mac_key, file = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W", tmp_path / "mac"
    file.write_text(mac_key, encoding="ascii")
    async with site(tmp_path, external_accounts={"customer-1": mac_key}) as one:
        external = ExternalAccount("customer-1", FileSource(str(file)))
        issuer = one.issuer(replace(one.settings, external_account=external))
        with capture_logs() as logs:
            async with at_work(issuer):
                await issuer.issue(order_for(NAME))
            assert all(finding.ok for finding in await issuer.check())
        values = (await one.store.load()).values
    (account,) = [json.loads(value.reveal()) for name, value in values.items() if name.startswith("account-")]
    secrets = [mac_key, account["key"]["d"], base64.b64encode(one.dns.key.secret.reveal()).decode("ascii")]
    said = "\n".join([caplog.text, repr(logs), values["orders.json"].reveal().decode("ascii")])
    assert "acme" in caplog.text  # the library has spoken
    assert not any(secret in said for secret in secrets)


async def test_a_ca_that_has_forgotten_the_account(tmp_path: Path) -> None:
    """A CA that no longer knows account and order is told the same key again, and the order begins anew."""
    async with site(tmp_path) as one:
        issuer = one.issuer()
        async with at_work(issuer):
            await issuer.issue(order_for(NAME))
        ca = one.ca
        server = one.dns
    async with server.running(), ca.running():
        one.roots_file.write_bytes(await ca.root_pem())  # new with each start
        issuer = one.issuer()
        async with at_work(issuer):
            assert dns_names((await issuer.issue(order_for(NAME))).chain) == {NAME}


async def test_a_dry_run(tmp_path: Path) -> None:
    """A dry run says what is right and what is wrong, each in words, and orders nothing."""
    async with site(tmp_path) as one:
        zoned: AcmeSettings = replace(one.settings, dns01=dns_settings(one.dns, zone=ZONE))
        good = await one.issuer(zoned).check()
        assert all(finding.ok for finding in good), good
        assert {"account", "directory", "DNS update", "name servers"} <= {finding.subject for finding in good}
        assert zoned.dns01 is not None
        wrong = replace(zoned, profile="nosuch", dns01=replace(zoned.dns01, key=None, zone="elsewhere.test"))
        bad = {finding.subject: finding.text for finding in await one.issuer(wrong).check() if not finding.ok}
        assert "not authorised" in bad["DNS update"]
        assert "no profile nosuch" in bad["profile"]
        assert one.ca.orders == []


async def test_an_unreachable_ca(tmp_path: Path) -> None:
    """A CA that is down, or whose TLS certificate is not trusted, is said to be; the order waits for it."""
    async with site(tmp_path) as one:
        untrusted = one.issuer(replace(one.settings, ca_file=None), patience_s=2)
        async with at_work(untrusted):
            refusal = await told(untrusted, order_for(NAME))
            assert "TLS certificate that is not trusted" in str(refusal)
            assert refusal.reason is Reason.ISSUANCE_PENDING
    (finding, *_) = [one for one in await one.issuer().check() if not one.ok]
    assert "cannot be reached" in finding.text


def _top(chain: tuple[bytes, ...]) -> str:
    return str(leaf((chain[-1],)).issuer.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _subject(der: bytes) -> str:
    return str(leaf((der,)).subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
