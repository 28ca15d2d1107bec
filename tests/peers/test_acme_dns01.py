"""Names proven by DNS: pebble in its strict mode, and bind9 that takes updates signed with TSIG."""

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

from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.tsig import ALGORITHMS, TsigKey
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from tests.peers.acme import ZONE, Site, at_work, dns_names, dns_settings, order_for, patiently, site, told
from tests.peers.bind9 import KEY, bind9, fronted, key_source
from tests.peers.processes import LOOPBACK
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "openssl")

CHALLENGE = "_acme-challenge.example.test"


async def _refused(one: Site, *names: str, **changes: object) -> CertmountError:
    """What a pod is told that gets no certificate."""
    assert one.settings.dns01 is not None
    settings = replace(one.settings, dns01=replace(one.settings.dns01, **changes))  # type: ignore[arg-type]  # names of fields, as given
    issuer = one.issuer(settings, patience_s=2)
    async with at_work(issuer):
        return await told(issuer, order_for(*names))


async def _primary(address: str) -> Nameserver:
    return await asyncio.to_thread(Nameserver.parse, address, "server")


def _log(one: Site) -> str:
    """What the DNS server has said."""
    return (one.dns.folder / "named.log").read_text(encoding="utf-8")


async def test_a_single_name(tmp_path: Path) -> None:
    """A pod's one name is proven and signed for the pod's own key; nothing is left in DNS."""
    async with site(tmp_path) as one:
        issuer = one.issuer()
        async with at_work(issuer):
            order = order_for("shop.example.test")
            issued = await issuer.issue(order)
            assert issuer.problem is None
            assert issuer.roots == issued.roots
        assert dns_names(issued.chain) == {"shop.example.test"}
        certificates = parse_certificates(issued.chain, "chain")
        assert certificates[0].public_key() == order.request.public_key
        (root,) = parse_certificates(issued.roots, "roots")
        certificates[-1].verify_directly_issued_by(root)
        assert not issued.identity_included
        assert issued.renew_after is not None
        assert await one.dns.texts("_acme-challenge.shop.example.test") == set()
        assert len(one.ca.orders) == 1


async def test_a_name_and_its_wildcard(tmp_path: Path) -> None:
    """A name and its wildcard are proven by two records side by side, and the record of someone else stays where it is."""
    async with site(tmp_path) as one:
        foreign = dns.update.UpdateMessage(ZONE)
        foreign.add(CHALLENGE + ".", 60, "TXT", "someone-else")
        foreign.use_tsig(KEY.for_wire())
        await dns.asyncquery.tcp(foreign, LOOPBACK, 5, one.dns.port)
        issuer = one.issuer()
        async with at_work(issuer):
            issued = await issuer.issue(order_for("example.test", "*.example.test"))
        assert dns_names(issued.chain) == {"example.test", "*.example.test"}
        assert one.ca.validations == 2
        assert await one.dns.texts(CHALLENGE) == {"someone-else"}


async def test_a_delegated_name(tmp_path: Path) -> None:
    """A CNAME of _acme-challenge is followed into a zone that may be changed, while the name's own zone may not."""
    zones = {ZONE: "_acme-challenge.shop IN CNAME shop.acme.test.", "acme.test": ""}
    server = bind9(tmp_path / "dns", zones, granted=frozenset({"acme.test"}), recursive=True)
    async with site(tmp_path, server) as one:
        issuer = one.issuer()
        async with at_work(issuer):
            issued = await issuer.issue(order_for("shop.example.test"))
        assert dns_names(issued.chain) == {"shop.example.test"}
        assert await one.dns.texts("shop.acme.test") == set()
        assert "adding an RR at 'shop.acme.test' TXT" in _log(one)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_each_algorithm(tmp_path: Path, algorithm: str) -> None:
    """Updates can be signed with every hmac-sha."""
    key = TsigKey("k", Secret(b"0123456789abcdef0123456789abcdef"), algorithm)
    server = bind9(tmp_path / "dns", {ZONE: ""}, key=key)
    async with server.running():
        update = dns.update.UpdateMessage(ZONE)
        update.add(CHALLENGE + ".", 60, "TXT", algorithm)
        primary = await _primary(server.address)
        await primary.update(update, key)
        assert await server.texts(CHALLENGE) == {algorithm}


@pytest.mark.parametrize(
    "key, words",
    [
        (replace(KEY, secret=Secret(b"another")), "another secret"),
        (replace(KEY, name="stranger"), "does not know the TSIG key"),
        (replace(KEY, algorithm="hmac-sha512"), "not authorised"),
        (None, "answers REFUSED"),
    ],
    ids=["secret", "name", "algorithm", "none"],
)
async def test_a_wrong_key(tmp_path: Path, key: TsigKey | None, words: str) -> None:
    """A key that the server does not accept is said to be 'not authorised', and how; the CA is never told to look."""
    async with site(tmp_path) as one:
        error = await _refused(one, "shop.example.test", key=key and key_source(tmp_path, key))
        assert error.reason is Reason.ISSUANCE_PENDING
        assert "not authorised" in str(error)
        assert words in str(error)
        assert one.ca.validations == 0


async def test_a_zone_that_is_elsewhere(tmp_path: Path) -> None:
    """For a name of which the server has no zone no order is made at all; the pod is told which server and which name."""
    elsewhere = bind9(tmp_path / "elsewhere", {"example.org": ""})
    async with site(tmp_path) as one, elsewhere.running():
        error = await _refused(one, "shop.example.org", resolvers=(elsewhere.address,))
        assert "not authorised" in str(error)
        assert re.search(r"has no zone that holds _acme-challenge\.shop\.example\.org", str(error))
        assert one.ca.orders == []


async def test_a_wrong_zone(tmp_path: Path) -> None:
    """A configured zone that the server does not have, or that does not hold the name, is told as such."""
    async with site(tmp_path) as one:
        foreign = await _refused(one, "shop.example.test", zone="shop.example.test")
        assert "not authorised" in str(foreign)
        assert "NOTAUTH to an update of zone shop.example.test" in str(foreign)
        outside = await _refused(one, "store.example.test", zone="other.test")
        assert "_acme-challenge.store.example.test is not in zone other.test" in str(outside)


async def test_a_zone_that_may_not_be_changed(tmp_path: Path) -> None:
    """A key without rights in the zone is not authorised."""
    async with site(tmp_path, bind9(tmp_path / "dns", {ZONE: ""}, granted=frozenset())) as one:
        assert "not authorised: it answers REFUSED" in str(await _refused(one, "shop.example.test"))


async def test_a_server_that_is_down_and_comes_back(tmp_path: Path) -> None:
    """While the DNS server is away the order waits, and says for what; afterwards the same question has its certificate, by one order."""
    server = bind9(tmp_path / "dns", {ZONE: ""})
    async with site(tmp_path, server) as one:
        settings = replace(one.settings, dns01=dns_settings(server))
    order = order_for("shop.example.test")
    async with one.ca.running():
        one.roots_file.write_bytes(await one.ca.root_pem())
        issuer = one.issuer(settings, patience_s=3)
        async with at_work(issuer):
            pending = await told(issuer, order)
            assert "DNS server" in str(pending)
            assert pending.reason is Reason.ISSUANCE_PENDING
            async with server.running():
                issued = await patiently(issuer, order)
        assert dns_names(issued.chain) == {"shop.example.test"}
        assert len(one.ca.orders) == 1


async def test_every_authoritative_server_is_asked(tmp_path: Path) -> None:
    """The CA is not told before the slowest server of the zone shows the record; until then the pod hears which one does not."""
    primary = bind9(tmp_path / "dns", {ZONE: ""})
    follower = bind9(tmp_path / "follower", {ZONE: ""}, primary=primary.port)
    primary = replace(primary, follower=follower.port)
    async with site(tmp_path, primary) as one:
        dns01 = dns_settings(primary, nameservers=(primary.address, follower.address))
        issuer = one.issuer(replace(one.settings, dns01=dns01), patience_s=3)
        order = order_for("shop.example.test")
        async with at_work(issuer):
            asking = asyncio.ensure_future(patiently(issuer, order))
            await until(lambda: "_acme-challenge.shop" in _log(one), "the record at the primary")
            assert one.ca.validations == 0
            async with follower.running():
                issued = await asking
        assert dns_names(issued.chain) == {"shop.example.test"}
        assert one.ca.validations == 1


@pytest.mark.root
async def test_the_servers_of_the_zone_are_found(tmp_path: Path) -> None:
    """Without a list of them, those are asked that the zone's NS records name, at port 53.

    Of a server's addresses one has to answer; one of which none does is waited for in vain.
    """
    public = replace(bind9(tmp_path / "dns", {ZONE: "ns IN AAAA 100::1\n"}), public="127.53.11.1")
    async with site(tmp_path, public) as one:
        async with fronted(public):
            issuer = one.issuer(replace(one.settings, dns01=dns_settings(public, nameservers=())))
            async with at_work(issuer):
                assert dns_names((await issuer.issue(order_for("shop.example.test"))).chain) == {"shop.example.test"}
        error = await _refused(one, "away.example.test", nameservers=(), patience=timedelta(seconds=1))
        assert "DNS server ns.example.test: DNS server " in str(error)


async def test_patience_with_servers_ends(tmp_path: Path) -> None:
    """A server that never shows the record is named with how long was waited."""
    async with site(tmp_path) as one:
        silent = bind9(tmp_path / "silent", {"other.test": ""})
        async with silent.running():
            error = await _refused(
                one, "shop.example.test", nameservers=(silent.address,), patience=timedelta(seconds=1)
            )
        assert f"DNS server {silent.address}: does not show the record" in str(error)
        assert "after 1 s" in str(error)
        assert one.ca.validations == 0
