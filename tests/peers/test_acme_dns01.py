"""DNS-01 with Pebble in strict mode and bind9, which accepts updates signed with TSIG; wildcards, delegations and caching resolvers."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import dns.asyncquery
import dns.message
import dns.rcode
import dns.rdatatype
import dns.update
import pytest

from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.tsig_key import TSIG_ALGORITHMS, TsigKey
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from tests.peers.acme import (
    ZONE,
    AcmeEnvironment,
    acme_environment,
    dns_names,
    failure_of,
    issue_when_ready,
    request_for,
    running_issuers,
)
from tests.peers.bind9 import KEY, Bind9, caching_resolver, fronted, key_source
from tests.peers.processes import LOOPBACK
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "openssl")

NAME = "shop.example.test"
APEX_CHALLENGE = "_acme-challenge.example.test"


async def _failure(env: AcmeEnvironment, *names: str, **changes: Any) -> CertmountError:
    return await env.failure(*names, configuration=env.with_dns01(**changes))


def _log(env: AcmeEnvironment) -> str:
    return (env.dns.directory / "named.log").read_text(encoding="utf-8")


async def test_certificate_for_one_name_is_issued_and_its_record_removed(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        issuer = env.issuer()
        async with running_issuers(issuer):
            request = request_for(NAME)
            issued = await issuer.issue(request)
            assert issuer.problem is None
            assert issuer.roots == issued.roots
        assert dns_names(issued.chain) == {NAME}
        certificates = parse_certificates(issued.chain, "chain")
        assert certificates[0].public_key() == request.csr.public_key
        (root,) = parse_certificates(issued.roots, "roots")
        certificates[-1].verify_directly_issued_by(root)
        assert issued.renew_after is not None
        assert await env.dns.texts("_acme-challenge.shop.example.test") == set()
        assert len(env.ca.orders) == 1


async def test_name_and_wildcard_use_two_records_and_other_records_stay(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        foreign = dns.update.UpdateMessage(ZONE)
        foreign.add(APEX_CHALLENGE + ".", 60, "TXT", "someone-else")
        foreign.use_tsig(KEY.for_dnspython())
        await dns.asyncquery.tcp(foreign, LOOPBACK, 5, env.dns.port)
        await env.issue("example.test", "*.example.test")
        assert env.ca.validations == 2
        assert await env.dns.texts(APEX_CHALLENGE) == {"someone-else"}


@pytest.mark.parametrize("algorithm", TSIG_ALGORITHMS)
async def test_bind9_accepts_all_tsig_algorithms(tmp_path: Path, algorithm: str) -> None:
    key = TsigKey("k", Secret(b"0123456789abcdef0123456789abcdef"), algorithm)
    server = Bind9(tmp_path / "dns", {ZONE: ""}, key=key)
    async with server.running():
        update = dns.update.UpdateMessage(ZONE)
        update.add(APEX_CHALLENGE + ".", 60, "TXT", algorithm)
        await (await asyncio.to_thread(Nameserver.parse, server.address, "server")).update(update, key)
        assert await server.texts(APEX_CHALLENGE) == {algorithm}


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
async def test_rejected_tsig_key_is_explained_before_validation(tmp_path: Path, key: TsigKey | None, text: str) -> None:
    async with acme_environment(tmp_path) as env:
        error = await _failure(env, NAME, key=key and key_source(tmp_path, key))
        assert error.reason is Reason.ISSUANCE_PENDING
        assert "not authorized" in str(error)
        assert text in str(error)
        assert env.ca.validations == 0


async def test_name_in_no_zone_of_the_server_causes_no_order(tmp_path: Path) -> None:
    elsewhere = Bind9(tmp_path / "elsewhere", {"example.org": ""})
    async with acme_environment(tmp_path) as env, elsewhere.running():
        error = await _failure(env, "shop.example.org", resolvers=(elsewhere.address,))
        assert "not authorized" in str(error)
        assert re.search(r"has no zone that contains _acme-challenge\.shop\.example\.org", str(error))
        assert env.ca.orders == []


async def test_wrong_configured_zone_is_explained(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        foreign = await _failure(env, NAME, zone=NAME)
        assert "not authorized" in str(foreign)
        assert "NOTAUTH to an update of zone shop.example.test" in str(foreign)
        outside = await _failure(env, "store.example.test", zone="other.test")
        assert "_acme-challenge.store.example.test is not in zone other.test" in str(outside)


async def test_key_without_permission_in_the_zone_is_not_authorized(tmp_path: Path) -> None:
    async with acme_environment(tmp_path, Bind9(tmp_path / "dns", {ZONE: ""}, granted=frozenset())) as env:
        assert "not authorized: it returned REFUSED" in str(await _failure(env, NAME))


async def test_order_continues_after_an_outage_of_the_dns_server(tmp_path: Path) -> None:
    async with acme_environment(tmp_path) as env:
        pass
    request = request_for(NAME)
    async with env.ca.running():
        env.roots_file.write_bytes(await env.ca.root_pem())
        issuer = env.issuer(wait_s=3)
        async with running_issuers(issuer):
            pending = await failure_of(issuer, request)
            assert "DNS server" in str(pending)
            assert pending.reason is Reason.ISSUANCE_PENDING
            async with env.dns.running():
                issued = await issue_when_ready(issuer, request)
        assert dns_names(issued.chain) == {NAME}
        assert len(env.ca.orders) == 1


async def test_ca_validates_only_after_all_servers_of_the_zone_serve_the_record(tmp_path: Path) -> None:
    primary = Bind9(tmp_path / "dns", {ZONE: ""})
    follower = Bind9(tmp_path / "follower", {ZONE: ""}, primary=primary.port)
    async with acme_environment(tmp_path, replace(primary, follower=follower.port)) as env:
        issuer = env.issuer(env.with_dns01(nameservers=(primary.address, follower.address)), wait_s=3)
        async with running_issuers(issuer):
            issuing = asyncio.ensure_future(issue_when_ready(issuer, request_for(NAME)))
            await until(lambda: "_acme-challenge.shop" in _log(env), "the record at the primary")
            assert env.ca.validations == 0
            async with follower.running():
                assert dns_names((await issuing).chain) == {NAME}
        assert env.ca.validations == 1


@pytest.mark.root
async def test_servers_in_ns_records_are_queried_by_default(tmp_path: Path) -> None:
    """One address of each server must respond at port 53."""
    public = replace(Bind9(tmp_path / "dns", {ZONE: "ns IN AAAA 100::1\n"}), public="127.53.11.1")
    async with acme_environment(tmp_path, public) as env:
        async with fronted(public):
            await env.issue(NAME, configuration=env.with_dns01(nameservers=()))
        error = await _failure(env, "away.example.test", nameservers=(), patience=timedelta(seconds=1))
        assert "DNS server ns.example.test: DNS server " in str(error)


async def test_server_that_never_serves_the_record_is_named(tmp_path: Path) -> None:
    silent = Bind9(tmp_path / "silent", {"other.test": ""})
    async with acme_environment(tmp_path) as env, silent.running():
        error = await _failure(env, NAME, nameservers=(silent.address,), patience=timedelta(seconds=1))
        assert f"DNS server {silent.address}: does not serve _acme-challenge.shop.example.test." in str(error)
        assert "after 1 s" in str(error)
        assert env.ca.validations == 0


CHALLENGE = "_acme-challenge.shop.example.test"
_HOUR_S = 3600
WILDCARD = "* IN CNAME ingress.lb.test."


def _added(server: Bind9, name: str) -> bool:
    return f"adding an RR at '{name}' TXT" in (server.directory / "named.log").read_text(encoding="utf-8")


async def _issue(env: AcmeEnvironment, *names: str, **changes: Any) -> None:
    await env.issue(*names, configuration=env.with_dns01(**changes))


@pytest.mark.parametrize(
    "records, record_name",
    [
        (WILDCARD, CHALLENGE),
        ("* IN CNAME nowhere.lb.test.", CHALLENGE),
        ("* IN CNAME ingress.nosuch.test.", CHALLENGE),
        ("* IN CNAME ingress.test.", CHALLENGE),  # in a zone above, whose SOA record must not be taken
        (f"{WILDCARD}\n*.shop IN CNAME ingress.lb.test.", CHALLENGE),
        (f"{WILDCARD}\nshop IN A 127.0.0.1", CHALLENGE),
        (f"{WILDCARD}\na.b._acme-challenge.shop IN TXT x", CHALLENGE),
        ('* IN TXT "v=spf1 -all"\n*.shop IN TXT "other"', CHALLENGE),
        (f"{WILDCARD}\n_acme-challenge.shop IN CNAME shop.acme.test.", "shop.acme.test"),
        ("_acme-challenge.shop IN CNAME a.acme.test.\n", "c.acme.test"),
        ("_acme-challenge.shop IN CNAME x.w.acme.test.\n", "x.w.acme.test"),
        ("shop IN DNAME d.acme.test.\n", "_acme-challenge.d.acme.test"),
    ],
    ids=[
        "wildcard", "wildcard to a missing name", "wildcard to a missing zone", "wildcard to the zone above",
        "deeper wildcard", "existing host", "empty non-terminal", "wildcard TXT", "delegation beside a wildcard",
        "chain", "delegation below a wildcard", "DNAME",
    ],
)  # fmt: skip
async def test_record_is_written_where_the_ca_finds_it(tmp_path: Path, records: str, record_name: str) -> None:
    """A wildcard does not apply to a name that exists (RFC 4592 sections 2.2.1 and 3.3.1), as the record's name then does."""
    acme = "a IN CNAME b\nb IN CNAME c\n*.w IN CNAME ingress.lb.test."
    zones = {ZONE: records, "lb.test": "ingress IN A 127.0.0.1", "acme.test": acme, "test": "ingress IN A 127.0.0.1"}
    server = Bind9(tmp_path / "dns", zones, granted=frozenset({ZONE, "acme.test"}), recursive=True)
    async with acme_environment(tmp_path, server) as env:
        await _issue(env, NAME)
        assert _added(server, record_name)
        assert await server.texts(record_name) <= {"other"}  # the record is gone, so the zone's wildcard applies again
        assert env.ca.validations == 1


@pytest.mark.parametrize("zone, record_name", [(ZONE, CHALLENGE), ("acme.test", "all.acme.test")])
async def test_wildcard_is_a_delegation_only_out_of_the_configured_zone(
    tmp_path: Path, zone: str, record_name: str
) -> None:
    """The authority can't add a record in a zone that is not configured, so the CA sees the CNAME of the wildcard."""
    zones = {ZONE: "* IN CNAME all.acme.test.", "acme.test": ""}
    server = Bind9(tmp_path / "dns", zones, granted=frozenset({zone}), recursive=True)
    async with acme_environment(tmp_path, server) as env:
        await _issue(env, NAME, f"*.{NAME}", zone=zone)
        assert _added(server, record_name)


async def test_loop_of_cnames_is_explained(tmp_path: Path) -> None:
    server = Bind9(tmp_path / "dns", {ZONE: "_acme-challenge.shop IN CNAME x\nx IN CNAME _acme-challenge.shop"})
    async with acme_environment(tmp_path, server) as env:
        assert f"{CHALLENGE}: has a chain of more than 8 CNAMEs, or a loop" in str(await env.failure(NAME))
        assert env.ca.orders == []


@contextlib.asynccontextmanager
async def _caching_environment(
    directory: Path, zones: dict[str, str], others: dict[str, Bind9] | None = None
) -> AsyncIterator[tuple[AcmeEnvironment, Bind9]]:
    """The CA validates through a resolver, which the authority uses too. The zones let it cache for an hour."""
    server = Bind9(directory / "dns", zones, negative_ttl_s=_HOUR_S)
    resolver = caching_resolver(directory / "resolver", {**dict.fromkeys(zones, server), **(others or {})})
    async with acme_environment(directory, server, resolver) as env, resolver.running():
        yield replace(env, configuration=env.with_dns01(resolvers=(resolver.address,))), resolver


@pytest.mark.parametrize("records", ["", WILDCARD, "shop IN A 127.0.0.1"], ids=["no name", "wildcard", "host"])
async def test_resolver_of_the_ca_caches_nothing_that_the_authority_asks(tmp_path: Path, records: str) -> None:
    async with _caching_environment(tmp_path, {ZONE: records}) as (env, _):
        await _issue(env, NAME, f"*.{NAME}")
        assert env.ca.validations == 2


async def test_resolver_that_knows_that_the_name_is_missing_fails_the_validation(tmp_path: Path) -> None:
    """The environment is as strict as the test before it needs: one query before the order is enough."""
    async with _caching_environment(tmp_path, {ZONE: ""}) as (env, resolver):
        query = dns.message.make_query(CHALLENGE, "TXT")
        response = await dns.asyncquery.tcp(query, LOOPBACK, 5, resolver.port)
        assert response.rcode() == dns.rcode.NOERROR
        assert not response.answer
        error = str(await env.failure(NAME, wait_s=10))
        assert "No TXT records found" in error or "unauthorized" in error


async def test_order_after_another_one_is_not_validated_with_its_record(tmp_path: Path) -> None:
    async with _caching_environment(tmp_path, {ZONE: ""}) as (env, _):
        for _ in range(3):
            await _issue(env, NAME)
        assert env.ca.validations == 3
        assert len(env.ca.issued) == 3


@pytest.mark.root
async def test_delegation_in_a_zone_of_other_servers_can_be_added_after_a_failure(tmp_path: Path) -> None:
    """The other zone's own servers are asked, so a resolver does not remember that the CNAME was missing."""
    other = replace(Bind9(tmp_path / "other", {"example.org": ""}, negative_ttl_s=_HOUR_S), public="127.53.11.2")
    async with _caching_environment(tmp_path, {"acme.test": ""}, {"example.org": other}) as (env, resolver):
        async with other.running(), fronted(other):
            error = await env.failure("shop.example.org")
            assert "has no zone that contains _acme-challenge.shop.example.org" in str(error)
            log = (resolver.directory / "named.log").read_text(encoding="utf-8")
            assert "query: example.org IN NS" in log
            assert "_acme-challenge" not in log
        with (other.directory / "example.org.db").open("a", encoding="ascii") as zone:
            zone.write("_acme-challenge.shop IN CNAME shop.acme.test.\n")
        async with other.running(), fronted(other):
            await _issue(env, "shop.example.org")
