"""DNS-01 with Pebble in strict mode, and with bind9, which accepts updates signed with TSIG."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import dns.asyncquery
import dns.rdatatype
import dns.update
import pytest

from csi_driver.authority.issuers.acme.nameserver import TSIG_ALGORITHMS, Nameserver, TsigKey
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from tests.peers.acme import (
    ZONE,
    AcmeEnvironment,
    acme_environment,
    dns_configuration,
    dns_names,
    failure_of,
    issue_when_ready,
    request_for,
    running_issuers,
)
from tests.peers.bind9 import KEY, bind9, fronted, key_source
from tests.peers.processes import LOOPBACK
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "openssl")

CHALLENGE = "_acme-challenge.example.test"


async def _failure(env: AcmeEnvironment, *names: str, **changes: object) -> CertmountError:
    assert env.configuration.dns01 is not None
    configuration = replace(env.configuration, dns01=replace(env.configuration.dns01, **changes))  # type: ignore[arg-type]  # names of fields
    issuer = env.issuer(configuration, wait_s=2)
    async with running_issuers(issuer):
        return await failure_of(issuer, request_for(*names))


async def _primary(address: str) -> Nameserver:
    return await asyncio.to_thread(Nameserver.parse, address, "server")


def _log(env: AcmeEnvironment) -> str:
    return (env.dns.directory / "named.log").read_text(encoding="utf-8")


async def test_certificate_for_one_name_is_issued_and_its_record_removed(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        issuer = env.issuer()
        async with running_issuers(issuer):
            request = request_for("shop.example.test")
            issued = await issuer.issue(request)
            assert issuer.problem is None
            assert issuer.roots == issued.roots
        assert dns_names(issued.chain) == {"shop.example.test"}
        certificates = parse_certificates(issued.chain, "chain")
        assert certificates[0].public_key() == request.csr.public_key
        (root,) = parse_certificates(issued.roots, "roots")
        certificates[-1].verify_directly_issued_by(root)
        assert not issued.identity_included
        assert issued.renew_after is not None
        assert await env.dns.texts("_acme-challenge.shop.example.test") == set()
        assert len(env.ca.orders) == 1


async def test_name_and_wildcard_use_two_records_and_other_records_stay(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        foreign = dns.update.UpdateMessage(ZONE)
        foreign.add(CHALLENGE + ".", 60, "TXT", "someone-else")
        foreign.use_tsig(KEY.for_dnspython())
        await dns.asyncquery.tcp(foreign, LOOPBACK, 5, env.dns.port)
        issuer = env.issuer()
        async with running_issuers(issuer):
            issued = await issuer.issue(request_for("example.test", "*.example.test"))
        assert dns_names(issued.chain) == {"example.test", "*.example.test"}
        assert env.ca.validations == 2
        assert await env.dns.texts(CHALLENGE) == {"someone-else"}


async def test_cname_of_the_challenge_name_is_followed_into_another_zone(tmp_path: Path) -> None:
    zones = {ZONE: "_acme-challenge.shop IN CNAME shop.acme.test.", "acme.test": ""}
    server = bind9(tmp_path / "dns", zones, granted=frozenset({"acme.test"}), recursive=True)
    async with acme_environment(tmp_path, server) as env:
        issuer = env.issuer()
        async with running_issuers(issuer):
            issued = await issuer.issue(request_for("shop.example.test"))
        assert dns_names(issued.chain) == {"shop.example.test"}
        assert await env.dns.texts("shop.acme.test") == set()
        assert "adding an RR at 'shop.acme.test' TXT" in _log(env)


@pytest.mark.parametrize("algorithm", TSIG_ALGORITHMS)
async def test_bind9_accepts_all_tsig_algorithms(tmp_path: Path, algorithm: str) -> None:
    key = TsigKey("k", Secret(b"0123456789abcdef0123456789abcdef"), algorithm)
    server = bind9(tmp_path / "dns", {ZONE: ""}, key=key)
    async with server.running():
        update = dns.update.UpdateMessage(ZONE)
        update.add(CHALLENGE + ".", 60, "TXT", algorithm)
        primary = await _primary(server.address)
        await primary.update(update, key)
        assert await server.texts(CHALLENGE) == {algorithm}


@pytest.mark.parametrize(
    "key, text",
    [
        (replace(KEY, secret=Secret(b"another")), "another secret"),
        (replace(KEY, name="unknown"), "does not know the name of the TSIG key"),
        (replace(KEY, algorithm="hmac-sha512"), "not authorized"),
        (None, "returned REFUSED"),
    ],
    ids=["secret", "name", "algorithm", "none"],
)
async def test_rejected_tsig_key_is_explained_and_the_ca_never_validates(
    tmp_path: Path, key: TsigKey | None, text: str
) -> None:
    async with acme_environment(tmp_path) as env:
        error = await _failure(env, "shop.example.test", key=key and key_source(tmp_path, key))
        assert error.reason is Reason.ISSUANCE_PENDING
        assert "not authorized" in str(error)
        assert text in str(error)
        assert env.ca.validations == 0


async def test_name_in_no_zone_of_the_server_causes_no_order(tmp_path: Path) -> None:
    elsewhere = bind9(tmp_path / "elsewhere", {"example.org": ""})
    async with acme_environment(tmp_path) as env, elsewhere.running():
        error = await _failure(env, "shop.example.org", resolvers=(elsewhere.address,))
        assert "not authorized" in str(error)
        assert re.search(r"has no zone that contains _acme-challenge\.shop\.example\.org", str(error))
        assert env.ca.orders == []


async def test_wrong_configured_zone_is_explained(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        foreign = await _failure(env, "shop.example.test", zone="shop.example.test")
        assert "not authorized" in str(foreign)
        assert "NOTAUTH to an update of zone shop.example.test" in str(foreign)
        outside = await _failure(env, "store.example.test", zone="other.test")
        assert "_acme-challenge.store.example.test is not in zone other.test" in str(outside)


async def test_key_without_permission_in_the_zone_is_not_authorized(tmp_path: Path) -> None:
    async with acme_environment(tmp_path, bind9(tmp_path / "dns", {ZONE: ""}, granted=frozenset())) as env:
        assert "not authorized: it returned REFUSED" in str(await _failure(env, "shop.example.test"))


async def test_order_continues_after_an_outage_of_the_dns_server(tmp_path: Path) -> None:
    server = bind9(tmp_path / "dns", {ZONE: ""})
    async with acme_environment(tmp_path, server) as env:
        configuration = replace(env.configuration, dns01=dns_configuration(server))
    request = request_for("shop.example.test")
    async with env.ca.running():
        env.roots_file.write_bytes(await env.ca.root_pem())
        issuer = env.issuer(configuration, wait_s=3)
        async with running_issuers(issuer):
            pending = await failure_of(issuer, request)
            assert "DNS server" in str(pending)
            assert pending.reason is Reason.ISSUANCE_PENDING
            async with server.running():
                issued = await issue_when_ready(issuer, request)
        assert dns_names(issued.chain) == {"shop.example.test"}
        assert len(env.ca.orders) == 1


async def test_ca_validates_only_after_all_servers_of_the_zone_serve_the_record(tmp_path: Path) -> None:
    primary = bind9(tmp_path / "dns", {ZONE: ""})
    follower = bind9(tmp_path / "follower", {ZONE: ""}, primary=primary.port)
    primary = replace(primary, follower=follower.port)
    async with acme_environment(tmp_path, primary) as env:
        dns01 = dns_configuration(primary, nameservers=(primary.address, follower.address))
        issuer = env.issuer(replace(env.configuration, dns01=dns01), wait_s=3)
        request = request_for("shop.example.test")
        async with running_issuers(issuer):
            issuing = asyncio.ensure_future(issue_when_ready(issuer, request))
            await until(lambda: "_acme-challenge.shop" in _log(env), "the record at the primary")
            assert env.ca.validations == 0
            async with follower.running():
                issued = await issuing
        assert dns_names(issued.chain) == {"shop.example.test"}
        assert env.ca.validations == 1


@pytest.mark.root
async def test_servers_in_ns_records_are_queried_by_default(tmp_path: Path) -> None:
    """One address of each server must respond at port 53."""
    public = replace(bind9(tmp_path / "dns", {ZONE: "ns IN AAAA 100::1\n"}), public="127.53.11.1")
    async with acme_environment(tmp_path, public) as env:
        async with fronted(public):
            issuer = env.issuer(replace(env.configuration, dns01=dns_configuration(public, nameservers=())))
            async with running_issuers(issuer):
                assert dns_names((await issuer.issue(request_for("shop.example.test"))).chain) == {"shop.example.test"}
        error = await _failure(env, "away.example.test", nameservers=(), patience=timedelta(seconds=1))
        assert "DNS server ns.example.test: DNS server " in str(error)


async def test_server_that_never_serves_the_record_is_named(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        silent = bind9(tmp_path / "silent", {"other.test": ""})
        async with silent.running():
            second = timedelta(seconds=1)
            error = await _failure(env, "shop.example.test", nameservers=(silent.address,), patience=second)
        assert f"DNS server {silent.address}: does not serve _acme-challenge.shop.example.test." in str(error)
        assert "after 1 s" in str(error)
        assert env.ca.validations == 0
