"""Slow, rejected and rate-limited orders, and orders of stopped replicas: always one order for a key and its names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.kube.client import ObjectName
from csi_driver.kube.connection import Api, ApiConfiguration
from csi_driver.kube.stored_objects import SecretStore
from tests.peers.acme import (
    ZONE,
    acme_environment,
    dns_configuration,
    dns_names,
    failure_of,
    issue_when_ready,
    leaf,
    request_for,
    running_issuers,
)
from tests.peers.bind9 import Bind9
from tests.peers.limiting_proxy import LimitingProxy
from tests.peers.processes import LOOPBACK
from tests.support.waiting import until
from tests.unit.kube.api_server import FakeApiServer

pytestmark = pytest.mark.peers("pebble", "named", "openssl")

NAME = "shop.example.test"
CHALLENGE = f"_acme-challenge.{NAME}"


@dataclass
class ShiftedClock:
    """The system clock plus an offset."""

    offset_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset_s


async def _until_record(server: Bind9, *, published: bool) -> None:
    deadline = time.monotonic() + 40
    while bool(await server.texts(CHALLENGE)) is not published:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_rejected_nonces_are_retried(tmp_path: Path) -> None:
    async with acme_environment(tmp_path, nonce_reject=30) as env:
        await env.issue(NAME, "*.example.test")
        assert len(env.ca.orders) == 1


async def test_slow_order_is_continued_by_later_calls(tmp_path: Path) -> None:
    async with acme_environment(tmp_path, retry_after_s=6) as env:
        counted: list[str] = []
        issuer = env.issuer(wait_s=0.5, count_order=counted.append)
        request, failures, issued = request_for(NAME), 0, None
        async with running_issuers(issuer), asyncio.timeout(120):
            while issued is None:
                try:
                    async with asyncio.timeout(30):
                        issued = await issuer.issue(request)
                except CertmountError as error:
                    assert error.reason is Reason.ISSUANCE_PENDING
                    failures += 1
        assert failures >= 5
        assert counted == ["issued"], "metrics count orders, not calls"
        assert dns_names(issued.chain) == {NAME}
        assert len(env.ca.orders) == len(env.ca.issued) == 1


async def test_same_key_and_names_get_the_same_certificate(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        issuer, other = env.issuer(), env.issuer()
        request = request_for(NAME)
        async with running_issuers(issuer, other):
            calls = [one.issue(request) for one in (issuer, issuer, other)]
            first, second, third = await asyncio.gather(*calls)
            assert first.chain == second.chain == third.chain
            assert len(env.ca.orders) == 1
            assert (await issuer.issue(request_for(NAME))).chain != first.chain
        assert len(env.ca.orders) == 2


async def test_another_replica_finishes_the_order_of_a_killed_one(tmp_path: Path) -> None:
    silent = Bind9(tmp_path / "silent", {"other.test": ""})
    async with acme_environment(tmp_path) as env, silent.running():
        # The first replica waits for a server that never serves the record, so it is killed before the CA validates.
        stuck = env.with_dns01(nameservers=(silent.address,))
        file = tmp_path / "replica"
        file.write_bytes(pickle.dumps((stuck, 2.0)))
        doomed = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.peers.acme_replica", str(file))
        issuer = env.issuer(lease_s=2)
        issuing = asyncio.ensure_future(issuer.issue(request_for(NAME)))
        try:
            await _until_record(env.dns, published=True)
        finally:
            os.kill(doomed.pid, signal.SIGKILL)
            await doomed.wait()
        async with running_issuers(issuer):
            issued = await issuing
            assert dns_names(issued.chain) == {NAME}
            assert await env.dns.texts(CHALLENGE) == set()
        assert len(env.ca.orders) == 1


async def test_stopping_replica_releases_its_orders(tmp_path: Path) -> None:
    """Another replica continues long before the lease would end."""
    async with acme_environment(tmp_path, retry_after_s=2) as env:
        stopping, remaining = env.issuer(lease_s=600), env.issuer(lease_s=600)
        request = request_for(NAME)
        issuing = asyncio.ensure_future(remaining.issue(request))
        async with running_issuers(stopping):
            await until(lambda: env.ca.validations, "the validation")
        assert not issuing.done()
        async with running_issuers(remaining):
            assert dns_names((await asyncio.wait_for(issuing, 20)).chain) == {NAME}
        assert len(env.ca.orders) == 1
        async with running_issuers(stopping):  # it can start again
            assert dns_names((await stopping.issue(request_for("b.example.test"))).chain) == {"b.example.test"}


@contextlib.asynccontextmanager
async def _cluster() -> AsyncIterator[tuple[FakeApiServer, SecretStore]]:
    server = FakeApiServer()
    async with server.running(), Api(ApiConfiguration(url=server.url)) as api:
        yield server, SecretStore(api, ObjectName("Secret", "certmount", "certmount-ca"))


async def test_replicas_share_orders_and_account_in_a_secret(tmp_path: Path) -> None:
    """Conflicting updates by other writers lose no order."""
    async with acme_environment(tmp_path) as env, _cluster() as (server, store):
        replicas = [AcmeIssuer("letsencrypt", env.configuration, store) for _ in range(2)]
        server.before_put += ["secrets/certmount-ca"] * 3
        names = [f"{number}.example.test" for number in range(4)]
        async with running_issuers(*replicas):
            calls = [replicas[index % 2].issue(request_for(name)) for index, name in enumerate(names)]
            issued = await asyncio.gather(*calls)
        assert [dns_names(each.chain) for each in issued] == [{name} for name in names]
        assert len(env.ca.orders) == 4
        log = (env.ca.directory / "pebble.log").read_text(encoding="utf-8")
        assert "There are now 1 accounts in memory" in log
        assert "There are now 2 accounts" not in log


async def test_order_continues_after_an_outage_of_the_store(tmp_path: Path) -> None:
    async with acme_environment(tmp_path, retry_after_s=2) as env, _cluster() as (server, store):
        issuer = AcmeIssuer("letsencrypt", env.configuration, store, lease_s=4)
        request = request_for(NAME)
        async with running_issuers(issuer):
            issuing = asyncio.ensure_future(issuer.issue(request))
            await until(lambda: env.ca.validations, "the validation")
            server.fail = (500, b"{}")
            await until(lambda: issuer.problem, "the problem")
            assert "API server" in (issuer.problem or "")
            with pytest.raises(CertmountError) as failure:
                await issuing
            assert failure.value.reason is Reason.ISSUER_UNAVAILABLE
            server.fail = None
            assert dns_names((await issue_when_ready(issuer, request)).chain) == {NAME}
            await until(lambda: issuer.problem is None, "the end of the problem")
        assert len(env.ca.orders) == 1


async def test_records_of_a_failed_order_are_removed_after_an_outage_of_the_dns_server(tmp_path: Path) -> None:
    """The CA queries a port that does not answer, so the validation fails some seconds after the outage began."""
    with socket.socket() as silent:
        # Pebble queries over TCP. The kernel accepts the connection, and no answer follows.
        silent.bind((LOOPBACK, 0))
        silent.listen()
        async with acme_environment(tmp_path) as env:
            ca = replace(env.ca, directory=tmp_path / "ca2", dns=f"{LOOPBACK}:{silent.getsockname()[1]}")
        async with ca.running():
            issuer = env.issuer(replace(env.configuration, ca_file=ca.ca_file))
            async with running_issuers(issuer):
                async with env.dns.running():
                    issuing = asyncio.ensure_future(failure_of(issuer, request_for(NAME)))
                    await until(lambda: ca.validations, "the validation")
                    assert await env.dns.texts(CHALLENGE)
                assert (await issuing).reason is Reason.ISSUER_UNAVAILABLE
                async with env.dns.running():
                    await _until_record(env.dns, published=False)


async def test_failed_validation_is_retried_only_after_minutes(tmp_path: Path) -> None:
    """Another key or another replica does not shorten the delay."""
    other_dns = Bind9(tmp_path / "other", {ZONE: ""})
    async with other_dns.running(), acme_environment(tmp_path) as env:
        clock = ShiftedClock()
        issuer = env.issuer(replace(env.configuration, dns01=dns_configuration(other_dns)), clock=clock)
        other = env.issuer(clock=clock)
        for each in (issuer, other):
            async with running_issuers(each):
                with pytest.raises(CertmountError, match="the authority retries after") as failure:
                    await each.issue(request_for(NAME))
            assert failure.value.reason is Reason.ISSUER_UNAVAILABLE
        assert len(env.ca.orders) == 1
        clock.offset_s = 301
        async with running_issuers(other):
            assert dns_names((await other.issue(request_for(NAME))).chain) == {NAME}


@pytest.mark.parametrize("dated", [False, True], ids=["seconds", "date"])
async def test_rate_limit_of_the_ca_is_respected_for_the_names(tmp_path: Path, dated: bool) -> None:
    async with acme_environment(tmp_path) as env:
        proxy = LimitingProxy(env.ca, status=429)
        if dated:
            proxy.retry_after = f"{datetime.now(UTC) + timedelta(hours=2):%a, %d %b %Y %H:%M:%S GMT}"
        clock = ShiftedClock()
        async with proxy.running():
            issuer = env.issuer(replace(env.configuration, directory=proxy.directory), clock=clock)
            async with running_issuers(issuer):
                for _ in range(3):
                    with pytest.raises(CertmountError, match="too many certificates") as failure:
                        await issuer.issue(request_for(NAME))
                    assert failure.value.reason is Reason.TOO_MANY_REQUESTS
                    hour = datetime.fromtimestamp(clock() + 7200, UTC)
                    assert f"the authority retries after {hour:%Y-%m-%dT%H:}" in str(failure.value)
                assert proxy.orders == 1
                proxy.status = 0
                issued = await issuer.issue(request_for("other.example.test"))
                assert dns_names(issued.chain) == {"other.example.test"}
                clock.offset_s = 7205
                assert dns_names((await issuer.issue(request_for(NAME))).chain) == {NAME}
        assert len(env.ca.orders) == 2


async def test_overloaded_ca_is_called_again_after_retry_after(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        proxy = LimitingProxy(env.ca, status=503, retry_after="3", detail="service busy")
        issuer = env.issuer(replace(env.configuration, directory=proxy.directory), wait_s=2)
        request = request_for(NAME)
        async with proxy.running(), running_issuers(issuer):
            error = await failure_of(issuer, request)
            assert "service busy" in str(error)
            assert error.reason is Reason.ISSUANCE_PENDING
            proxy.status = 0
            assert dns_names((await issue_when_ready(issuer, request)).chain) == {NAME}
        assert proxy.orders == 2


async def test_renewal_follows_the_suggested_window(tmp_path: Path) -> None:
    """When the CA moves the window to now, the certificate is due, and the new order replaces it."""
    async with acme_environment(tmp_path) as env:
        clock = ShiftedClock()
        issuer = env.issuer(clock=clock)
        request = request_for(NAME)
        async with running_issuers(issuer):
            issued = await issuer.issue(request)
            assert issued.renew_after is not None
            assert timedelta(days=50) < issued.renew_after < timedelta(days=89)
            assert issuer.renewals_due() == ()
            yesterday, now = datetime.now(UTC) - timedelta(days=1), datetime.now(UTC)
            await env.ca.set_renewal(leaf(issued.chain), f"{yesterday:%Y-%m-%dT%H:%M:%SZ}", f"{now:%Y-%m-%dT%H:%M:%SZ}")
            clock.offset_s = 7 * 3600  # the CA's Retry-After is six hours
            await issuer.renewals.poll()
            assert len(issuer.renewals_due()) == 1
            assert issuer.keys_to_replace() == issuer.renewals_due()  # the CA can have revoked the certificate
            successor = await issuer.issue(request)
            assert successor.chain != issued.chain
            assert issuer.renewals_due() == ()
        assert "is a replacement of" in (env.ca.directory / "pebble.log").read_text(encoding="utf-8")


async def test_profile_selects_a_short_lifetime(tmp_path: Path) -> None:
    days = {"default": 90, "shortlived": 6}
    profiles = {name: {"description": "", "validityPeriod": lifetime * 86400} for name, lifetime in days.items()}
    async with acme_environment(tmp_path, profiles=profiles) as env:
        issued = await env.issue(NAME, configuration=replace(env.configuration, profile="shortlived"))
        certificate = leaf(issued.chain)
        lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert timedelta(days=5) < lifetime < timedelta(days=7)
        assert issued.renew_after is not None
        assert issued.renew_after < lifetime


async def test_preferred_chain_is_selected_by_the_name_of_its_root(tmp_path: Path) -> None:
    async with acme_environment(tmp_path, environment={"PEBBLE_ALTERNATE_ROOTS": "1"}) as env:

        async def top(preferred: str | None) -> str:
            issued = await env.issue(NAME, configuration=replace(env.configuration, preferred_chain=preferred))
            return _common_name(leaf((issued.chain[-1],)).issuer)

        default = await top(None)
        assert await top("Unknown") == default
        other = _common_name(leaf((await env.ca.root(1),)).subject)
        env.roots_file.write_bytes(await env.ca.root_pem() + await env.ca.root_pem(1))
        assert await top(other) == other != default


async def test_chain_that_ends_at_another_root_is_rejected_until_the_roots_are_fixed(tmp_path: Path) -> None:
    async with acme_environment(tmp_path, environment={"PEBBLE_ALTERNATE_ROOTS": "1"}) as env:
        env.roots_file.write_bytes(await env.ca.root_pem(1))
        issuer, request = env.issuer(), request_for(NAME)
        async with running_issuers(issuer):
            with pytest.raises(CertmountError, match="ends at CN=Pebble Root") as failure:
                await issuer.issue(request)
            assert failure.value.reason is Reason.ISSUER_UNAVAILABLE
            env.roots_file.write_bytes(await env.ca.root_pem())
            assert dns_names((await issuer.issue(request)).chain) == {NAME}
        assert len(env.ca.orders) == 1


def _common_name(name: x509.Name) -> str:
    return str(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


pytestmark = pytest.mark.peers("pebble", "named")


def request_of(namespace: str, name: str) -> IssuerRequest:
    pod = PodIdentity(ServiceAccount(namespace, "app"), "", "app-0", "u", "node-1", "u", 0.0)
    return replace(request_for(name), identity=pod)


async def test_flood_of_one_tenant_does_not_delay_another(tmp_path: Path) -> None:
    """Its 300 orders wait for a name server that does not know their zone."""
    async with acme_environment(tmp_path) as env:
        issuer = env.issuer(wait_s=5)

        async def victim(name: str) -> float:
            started = time.monotonic()
            issued = await issue_when_ready(issuer, request_of("bank", name))
            assert dns_names(issued.chain) == {name}
            return time.monotonic() - started

        async with running_issuers(issuer):
            quiet_s = await victim("quiet.example.test")
            requests = [request_of("shop", f"n{number}.nowhere.test") for number in range(300)]
            flood = [asyncio.ensure_future(issuer.issue(request)) for request in requests]
            await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            attacked_s = await victim("victim.example.test")
            errors = await asyncio.gather(*flood, return_exceptions=True)
    print(f"quiet {quiet_s:.2f} s, attacked {attacked_s:.2f} s")
    assert attacked_s < 2 * quiet_s + 2
    reasons = [one.reason for one in errors if isinstance(one, CertmountError)]
    assert reasons.count(Reason.SHARE_EXCEEDED) > 200
    assert len(reasons) == 300
