"""The step-ca issuer against the real step-ca."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.issuers.step_ca.client import Client
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.issuer import StepCA
from csi_driver.authority.issuers.step_ca.request import claims_of
from csi_driver.authority.issuers.step_ca.provisioner_key import load_provisioner_key
from csi_driver.core.certificates.csr import build_csr, names_of, parse_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.certificates.verification import ExpectedCertificate, verify_certificate
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import URI, DNSName, EmailAddress, IPAddress, Names, spiffe_id
from csi_driver.core.policy.engine import Grant
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType, Usage
from tests.peers.step_ca import RealStepCA, new_jwk
from tests.support.provisioner_key import JWE, JWK, PASSWORD
from tests.support.waiting import until

pytestmark = pytest.mark.peers("step-ca")

POD = PodIdentity(ServiceAccount("default", "hello"), "sa-uid", "hello-1", "pod-uid", "node-1", "node-uid", 9e9)
OWN = spiffe_id("cluster.local", "default", "hello")
NAME = "hello.default.svc"


def order(
    key: PrivateKey,
    asked: Names = Names.of([DNSName.parse(NAME)]),  # noqa: B008  # frozen
    life: timedelta = timedelta(hours=1),
    usages: tuple[Usage, ...] = ALL_USAGES,
) -> IssuerRequest:
    """What the desk hands over for a pod: the request, and its names with the SPIFFE ID."""
    granted = Names.of(asked.dns, (OWN, *asked.uris), asked.ips, asked.emails)
    return IssuerRequest(parse_csr(build_csr(key, asked)), Grant(granted, life, usages, ("built-in",)), POD)


@dataclass
class Pair:
    """An issuer, and a key that it signs for."""

    issuer: StepCA
    key: PrivateKey

    async def issue(self, **changes: Any) -> IssuedCertificate:
        return await self.issuer.issue(order(self.key, **changes))

    async def refused(self, **changes: Any) -> CertmountError:
        with pytest.raises(CertmountError) as refusal:
            await self.issue(**changes)
        return refusal.value

    def judge(self, issued: IssuedCertificate) -> x509.Certificate:
        """The leaf, once the node's own judgement is passed."""
        expected = ExpectedCertificate(self.key.public_key(), Names.of([DNSName.parse(NAME)]), "default", "hello")
        return verify_certificate(issued.chain, issued.roots, expected, datetime.now(UTC)).leaf


@contextlib.asynccontextmanager
async def using(configuration: StepCAConfiguration, key_type: KeyType = KeyType.EC_P256) -> AsyncIterator[Pair]:
    """An issuer at work, as the authority runs it."""
    issuer = StepCA("step", configuration, CredentialReader())
    running = asyncio.create_task(issuer.run())
    try:
        yield Pair(issuer, generate_key(key_type))
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[RealStepCA]:
    async with RealStepCA(tmp_path / "step") as running:
        yield running


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.ED25519])
async def test_what_step_ca_signs_passes_the_nodes_judgement(key_type: KeyType, ca: RealStepCA) -> None:
    """Key, names, usages and life are those of the order, and the chain leads to step-ca's root."""
    async with using(ca.configuration(), key_type) as pair:
        issued = await pair.issue()
        leaf = pair.judge(issued)
    assert issued.roots == (ca.root_der,)
    assert {*names_of(leaf.extensions)} == {DNSName(NAME), OWN}
    life = leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(minutes=59) < life <= timedelta(hours=1)
    assert len(issued.chain) == 2


async def test_every_kind_of_name_is_signed_exactly(ca: RealStepCA) -> None:
    """Names, addresses, mail addresses and URIs, and the SPIFFE ID beside them."""
    asked = Names.of(
        [DNSName.parse(NAME), DNSName.parse("*.example.com")],
        [OWN, URI.parse("https://example.com/a")],
        [IPAddress.parse("10.0.0.1"), IPAddress.parse("fd00::1")],
        [EmailAddress.parse("ops@example.com")],
    )
    async with using(ca.configuration()) as pair:
        issued = await pair.issue(asked=asked)
        assert {*names_of(x509.load_der_x509_certificate(issued.chain[0]).extensions)} == {*asked}
        nameless = await pair.issue(asked=Names())
        leaf = x509.load_der_x509_certificate(nameless.chain[0])
        assert {*names_of(leaf.extensions)} == {OWN}
        assert leaf.subject.rfc4514_string() == "CN=default/hello"


async def test_a_request_with_some_of_the_uris_is_refused_with_the_way_out(ca: RealStepCA) -> None:
    """Step-ca would refuse it with less words: it takes all URIs of the certificate in the request, or none."""
    async with using(ca.configuration()) as pair:
        refusal = await pair.refused(asked=Names.of(uris=[URI.parse("https://example.com/a")]))
    assert refusal.reason is Reason.NAME_NOT_ALLOWED
    assert f"add {OWN} to the volume's uri-sans" in str(refusal)


async def test_ten_rotations_with_a_restart_in_between(ca: RealStepCA) -> None:
    """A pod's certificate is renewed on and on; a step-ca that was away for a moment costs none of it."""
    serials = set()
    async with using(ca.configuration()) as pair:
        for round_ in range(10):
            pair.key = generate_key(KeyType.EC_P256)
            if round_ == 5:
                await ca.restart()
            serials.add(pair.judge(await pair.issue()).serial_number)
    assert len(serials) == 10


async def test_a_step_ca_that_is_away_is_said_to_be(ca: RealStepCA) -> None:
    """What may pass is retryable, named, and gone when step-ca is back."""
    async with using(ca.configuration()) as pair:
        await pair.issue()
        await ca.stop()
        refusal = await pair.refused()
        assert refusal.reason is Reason.ISSUER_UNAVAILABLE
        assert "issuer step: no connection: Connection refused" in str(refusal)
        await pair.issuer.check()
        assert "no connection" in (pair.issuer.problem or "")
        assert pair.issuer.roots == (ca.root_der,), "what pods trust does not change by an outage"
        await ca.start()
        pair.judge(await pair.issue())
        await until(lambda: pair.issuer.problem is None, "the problem's end")


async def test_the_root_may_come_from_a_file(ca: RealStepCA) -> None:
    """Which is read anew while the authority runs."""
    async with using(ca.configuration(root_sha256=None, root_file=str(ca.root_file))) as pair:
        pair.judge(await pair.issue())


async def test_a_wrong_fingerprint_ends_before_anything_is_said(ca: RealStepCA, tmp_path: Path) -> None:
    """Neither a fingerprint that is nobody's nor another CA's root lets a token out."""
    async with using(ca.configuration(root_sha256="ab" * 32)) as pair:
        refusal = await pair.refused()
        assert f"step-ca has no root with the SHA-256 {'ab' * 32}" in str(refusal)
    other = RealStepCA(tmp_path / "other", name="Other")
    async with using(ca.configuration(root_sha256=None, root_file=str(other.root_file))) as pair:
        refusal = await pair.refused()
        assert "TLS: its certificate does not lead to the configured root" in str(refusal)
    assert "ott" not in ca.log.read_text()


async def test_a_foreign_host_name_is_refused(ca: RealStepCA) -> None:
    """Whoever has a certificate of this CA for another name is not step-ca."""
    async with using(replace(ca.configuration(), url=f"https://127.0.0.1:{ca.port}")) as pair:
        refusal = await pair.refused()
    assert "TLS: its certificate is not for this host name" in str(refusal)


async def test_a_wrong_provisioner_or_key_is_told_before_a_token_is_sent(ca: RealStepCA, tmp_path: Path) -> None:
    """By its name, its type, its kid or its thumbprint, which step-ca lists; its answer would be a 401 without a reason."""
    async with using(ca.configuration(provisioner="cis")) as pair:
        refusal = str(await pair.refused())
        assert "step-ca has no provisioner by the name cis; it has csi (JWK), acme (ACME)" in refusal
    async with using(ca.configuration(provisioner="acme")) as pair:
        assert "acme is of type ACME; a JWK provisioner is needed" in str(await pair.refused())
    other = tmp_path / "other.jwk"
    other.write_text(json.dumps(new_jwk()))
    async with using(ca.configuration(key=FileSource(str(other)))) as pair:
        refusal = str(await pair.refused())
        assert "IssuerUnavailable: issuer step: key: it is another one" in refusal
        assert f"the provisioner's is {ca.jwk['kid']}" in refusal
    other.write_text(json.dumps({**new_jwk(), "kid": ca.jwk["kid"]}))
    async with using(ca.configuration(key=FileSource(str(other)))) as pair:
        assert "it has the provisioner's kid" in str(await pair.refused())
        # As when the Secret is corrected: no restart.
        other.write_text(ca.key_file.read_text())
        pair.judge(await pair.issue())


async def test_the_opaque_401_is_explained(ca: RealStepCA) -> None:
    """A provisioner that got another key while the authority runs: its old key's token is refused, and the reason found out."""
    async with using(ca.configuration()) as pair:
        await pair.issue()
        ca.jwk = new_jwk()
        await ca.restart()
        refusal = str(await pair.refused())
        assert "step-ca refuses the authority's token (HTTP 401): key: it is another one: its kid is" in refusal
        ca.key_file.write_text(json.dumps(ca.jwk))
        pair.judge(await pair.issue())


async def test_an_unlike_clock_is_found(ca: RealStepCA) -> None:
    """By the time that step-ca tells in each answer."""

    def slow() -> datetime:
        return datetime.now(UTC) - timedelta(minutes=10)

    issuer = StepCA("step", ca.configuration(), CredentialReader(), clock=slow)
    running = asyncio.create_task(issuer.run())
    try:
        with pytest.raises(CertmountError, match=r"clock: step-ca's is (599|600|601) s ahead"):
            await issuer.issue(order(generate_key(KeyType.EC_P256)))
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_life_outside_the_limits_is_refused_before_it_is_asked_for(tmp_path: Path) -> None:
    """The provisioner's claims tell its limits; where it has none, step-ca's own refusal is passed on."""
    limits = {"minTLSCertDuration": "10m", "maxTLSCertDuration": "2h", "defaultTLSCertDuration": "1h"}
    async with RealStepCA(tmp_path / "limited", claims=limits) as ca, using(ca.configuration()) as pair:
        for life in (timedelta(minutes=9), timedelta(hours=3)):
            refusal = await pair.refused(life=life)
            assert refusal.reason is Reason.NAME_NOT_ALLOWED
            assert f"duration: {format_duration(life)} is not within what the provisioner signs, 10m to 2h" in str(
                refusal
            )
        assert '"path":"/1.0/sign"' not in ca.log.read_text().replace(" ", "")
        pair.judge(await pair.issue(life=timedelta(hours=2)))
    async with RealStepCA(tmp_path / "usual") as ca, using(ca.configuration()) as pair:
        refusal = await pair.refused(life=timedelta(hours=48))
        assert refusal.reason is Reason.NAME_NOT_ALLOWED
        assert "step-ca refuses it: requested duration of 48h1m0s is more than the authorized maximum" in str(refusal)


async def test_a_key_that_step_ca_cannot_read_is_refused_before_it_is_asked(ca: RealStepCA) -> None:
    """Post-quantum keys are for the internal CA."""
    async with using(ca.configuration(), KeyType.ML_DSA_44) as pair:
        assert "key-type: step-ca signs RSA, EC and Ed25519 keys only" in str(await pair.refused())


async def test_usages_need_a_template_that_heeds_the_token(ca: RealStepCA, tmp_path: Path) -> None:
    """The usual template gives both: no certificate with more usages than granted leaves the authority."""
    async with using(ca.configuration()) as pair:
        refusal = await pair.refused(usages=(Usage.SERVER,))
        assert refusal.reason is Reason.INVALID_RESPONSE
        assert "the certificate is for client and server, not for server" in str(refusal)
    options = {"x509": {"template": documented_template()}}
    async with (
        RealStepCA(tmp_path / "templated", options=options) as templated,
        using(templated.configuration()) as pair,
    ):
        for usages in ((Usage.SERVER,), (Usage.CLIENT,), ALL_USAGES):
            pair.judge(await pair.issue(usages=usages))


def documented_template() -> str:
    """The template of docs/issuers.md."""
    text = (Path(__file__).parents[2] / "docs" / "issuers.md").read_text()
    return text.split("<!-- template -->")[1].split("```")[1].removeprefix("json\n")


@pytest.fixture
async def wire(ca: RealStepCA) -> AsyncIterator[Client]:
    """A connection to step-ca beside the issuer, for who has got hold of a token."""
    async with Client(ca.url, (ca.root,)) as client:
        yield client


def captured(ca: RealStepCA, wanted: IssuerRequest) -> dict[str, str]:
    """The request that the issuer would send for an order."""
    key = load_provisioner_key(Secret(ca.key_file.read_bytes()), None)
    token = key.token(claims_of(wanted, ca.configuration(), "nonce-1"), datetime.now(UTC)).reveal()
    csr = x509.load_der_x509_csr(wanted.request.der).public_bytes(Encoding.PEM).decode()
    return {"csr": csr, "ott": token, "notAfter": "1h"}


async def test_a_token_is_good_for_one_use(ca: RealStepCA, wire: Client) -> None:
    """Whoever captures one gets nothing for it, not even the same certificate again."""
    body = captured(ca, order(generate_key(KeyType.EC_P256)))
    assert (await wire.post("/1.0/sign", body)).status == 201
    assert (await wire.post("/1.0/sign", body)).status == 401


async def test_a_token_is_good_for_one_request(ca: RealStepCA, wire: Client) -> None:
    """Whoever captures one before its use can't have another key signed."""
    body = captured(ca, order(generate_key(KeyType.EC_P256)))
    foreign = captured(ca, order(generate_key(KeyType.EC_P256)))
    answer = await wire.post("/1.0/sign", {**body, "csr": foreign["csr"]})
    assert answer.status == 403
    assert "fingerprint does not match" in answer.message


async def test_pods_trust_whom_step_ca_federates_with(tmp_path: Path) -> None:
    """Two CAs that federate: pods of either trust the roots of both, also when the federation comes later."""
    east, west = (RealStepCA(tmp_path / name, name=name.title()) for name in ("east", "west"))
    async with east, west, using(east.configuration()) as one, using(west.configuration()) as other:
        await one.issuer.check()
        assert one.issuer.roots == (east.root_der,)
        east.federated = [west.root_file]
        await east.restart()
        await one.issuer.check()
        assert set(one.issuer.roots) == {east.root_der, west.root_der}
        assert set((await one.issue()).roots) == {east.root_der, west.root_der}
        # A pod of the west shows its certificate to a pod of the east.
        theirs = await other.issue()
        expected = ExpectedCertificate(other.key.public_key(), Names.of([DNSName.parse(NAME)]), "default", "hello")
        verify_certificate(theirs.chain, one.issuer.roots, expected, datetime.now(UTC))


async def test_an_encrypted_key_is_decrypted_by_its_password(tmp_path: Path) -> None:
    """From a file, or as step-ca itself hands it out: then the password is all that certmount is given."""
    password, key = tmp_path / "password", tmp_path / "key.jwe"
    password.write_text(PASSWORD + "\n")
    key.write_text(JWE)
    secret = FileSource(str(password))
    async with RealStepCA(tmp_path / "ca", jwk=JWK, encrypted_key=JWE) as ca:
        for source in (FileSource(str(key)), None):
            async with using(ca.configuration(key=source, password=secret)) as pair:
                pair.judge(await pair.issue())
        password.write_text("wrong")
        async with using(ca.configuration(key=None, password=secret)) as pair:
            assert "key: it is encrypted with another password than the one given" in str(await pair.refused())


async def test_a_check_says_all_that_issuing_needs(ca: RealStepCA) -> None:
    """In the order in which one thing needs the other."""
    findings = await StepCA("step", ca.configuration(), CredentialReader()).check()
    assert all(finding.ok for finding in findings)
    assert [finding.subject for finding in findings] == ["reachable", "roots", "provisioner", "key", "lives", "clock"]
    assert ca.log.read_text().count('path="/1.0/sign"') == 0


async def test_no_secret_is_ever_shown(ca: RealStepCA, tmp_path: Path) -> None:
    """Neither the key nor a token is in what people are told, whatever goes wrong."""
    broken = tmp_path / "broken.jwk"
    canary = "canary-d-of-the-key"
    for content in (json.dumps({**ca.jwk, "d": canary}), f'{{"d": "{canary}"', f"{canary}.a.b.c.d"):
        broken.write_text(content)
        async with using(ca.configuration(key=FileSource(str(broken)))) as pair:
            refusal = str(await pair.refused())
            assert "key: it is" in refusal
            assert canary not in refusal
            assert canary not in repr(await pair.issuer.check())
