"""The step-ca issuer against the real step-ca."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.issuers.step_ca.client import StepCAClient
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.issuer import StepCAIssuer
from csi_driver.authority.issuers.step_ca.provisioner_key import load_provisioner_key
from csi_driver.authority.issuers.step_ca.provisioners import token_claims
from csi_driver.core.certificates.csr import build_csr, names_of, parse_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.certificates.verification import ExpectedCertificate, verify_certificate
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.policy.engine import Grant
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType, Usage
from tests.peers.step_ca import RealStepCA, new_jwk
from tests.support.provisioner_key import JWE, JWK, PASSWORD
from tests.support.waiting import in_background, until
from tests.unit.core import pki

pytestmark = pytest.mark.peers("step-ca")

POD = PodIdentity(ServiceAccount("default", "hello"), "sa-uid", "hello-1", "pod-uid", "node-1", "node-uid", 9e9)
OWN = spiffe_id("cluster.local", "default", "hello")
NAME = "hello.default.svc"


def request(
    key: PrivateKey,
    names: Names = Names.of([DNSName.parse(NAME)]),  # noqa: B008  # frozen
    lifetime: timedelta = timedelta(hours=1),
    usages: tuple[Usage, ...] = ALL_USAGES,
) -> IssuerRequest:
    granted = Names.of(names.dns, (OWN, *names.uris), names.ips, names.emails)
    return IssuerRequest(parse_csr(build_csr(key, names)), Grant(granted, lifetime, usages, ("built-in",)), POD)


@dataclass
class Pair:
    """A running issuer, and a key to sign."""

    issuer: StepCAIssuer
    key: PrivateKey

    async def issue(self, **changes: Any) -> IssuedCertificate:
        return await self.issuer.issue(request(self.key, **changes))

    async def failure(self, **changes: Any) -> CertmountError:
        with pytest.raises(CertmountError) as failure:
            await self.issue(**changes)
        return failure.value

    def verified_leaf(self, issued: IssuedCertificate, roots: Sequence[bytes] | None = None) -> x509.Certificate:
        expected = ExpectedCertificate(self.key.public_key(), Names.of([DNSName.parse(NAME)]), "default", "hello")
        return verify_certificate(issued.chain, roots or issued.roots, expected, datetime.now(UTC)).leaf


@contextlib.asynccontextmanager
async def using(
    configuration: StepCAConfiguration, key_type: KeyType = KeyType.EC_P256, **options: Any
) -> AsyncIterator[Pair]:
    issuer = StepCAIssuer("step", configuration, CredentialReader(), **options)
    async with in_background(issuer.run()):
        yield Pair(issuer, generate_key(key_type))


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[RealStepCA]:
    async with RealStepCA(tmp_path / "step") as running:
        yield running


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.ED25519])
async def test_certificate_passes_the_nodes_verification(key_type: KeyType, ca: RealStepCA) -> None:
    async with using(ca.configuration(), key_type) as pair:
        issued = await pair.issue()
        leaf = pair.verified_leaf(issued)
    assert issued.roots == (ca.root_der,)
    assert {*names_of(leaf.extensions)} == {DNSName(NAME), OWN}
    lifetime = leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(minutes=59) < lifetime <= timedelta(hours=1)
    assert len(issued.chain) == 2


async def test_all_kinds_of_names_are_signed(ca: RealStepCA) -> None:
    names = pki.names(
        NAME, "*.example.com", OWN.text, "https://example.com/a", "10.0.0.1", "fd00::1", "ops@example.com"
    )
    async with using(ca.configuration()) as pair:
        issued = await pair.issue(names=names)
        assert {*names_of(x509.load_der_x509_certificate(issued.chain[0]).extensions)} == {*names}
        nameless = await pair.issue(names=Names())
        leaf = x509.load_der_x509_certificate(nameless.chain[0])
        assert {*names_of(leaf.extensions)} == {OWN}
        assert leaf.subject.rfc4514_string() == "CN=default/hello"


async def test_csr_without_names_gets_the_granted_names(ca: RealStepCA) -> None:
    """A pod certificate: the kubelet's CSR contains only a key, and the authority's token contains the names."""
    stub = parse_csr(build_csr(generate_key(KeyType.EC_P256), Names()))
    granted = Names.of([DNSName.parse(NAME)], (OWN,))
    grant = Grant(granted, timedelta(hours=1), ALL_USAGES, ("built-in",))
    async with using(ca.configuration()) as pair:
        issued = await pair.issuer.issue(IssuerRequest(replace(stub, names=granted), grant, POD))
    leaf = x509.load_der_x509_certificate(issued.chain[0])
    assert {*names_of(leaf.extensions)} == {*granted}
    # The API server requires an hour in all, and notBefore within five minutes.
    assert timedelta(hours=1) <= leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(minutes=62)


async def test_request_must_contain_all_uris_or_none(ca: RealStepCA) -> None:
    async with using(ca.configuration()) as pair:
        error = await pair.failure(names=pki.names("https://example.com/a"))
    assert error.reason is Reason.NAME_NOT_ALLOWED
    assert f"add {OWN} to the volume's uri-sans" in str(error)


async def test_certificates_are_issued_across_a_restart_of_step_ca(ca: RealStepCA) -> None:
    serials = set()
    async with using(ca.configuration()) as pair:
        for round_ in range(10):
            pair.key = generate_key(KeyType.EC_P256)
            if round_ == 5:
                await ca.restart()
            serials.add(pair.verified_leaf(await pair.issue()).serial_number)
    assert len(serials) == 10


async def test_unavailable_step_ca_is_a_problem_until_it_is_back(ca: RealStepCA) -> None:
    async with using(ca.configuration()) as pair:
        await pair.issue()
        await ca.stop()
        error = await pair.failure()
        assert error.reason is Reason.ISSUER_UNAVAILABLE
        assert "issuer step: cannot connect: Connection refused" in str(error)
        await pair.issuer.diagnose()
        assert "cannot connect" in (pair.issuer.problem or "")
        assert pair.issuer.roots == (ca.root_der,), "an outage must not change what pods trust"
        await ca.start()
        pair.verified_leaf(await pair.issue())
        await until(lambda: pair.issuer.problem is None, "the end of the problem")


async def test_no_token_is_sent_to_a_server_with_another_root(ca: RealStepCA, tmp_path: Path) -> None:
    async with using(ca.configuration(root_sha256="ab" * 32)) as pair:
        error = await pair.failure()
        assert f"step-ca has no root with the SHA-256 {'ab' * 32}" in str(error)
    other = RealStepCA(tmp_path / "other", name="Other")
    async with using(ca.configuration(root_sha256=None, root_file=str(other.root_file))) as pair:
        error = await pair.failure()
        assert "TLS: the server's certificate is not issued by the configured root" in str(error)
    assert "ott" not in ca.log.read_text()
    async with using(ca.configuration(root_sha256=None, root_file=str(ca.root_file))) as pair:
        pair.verified_leaf(await pair.issue())


async def test_certificate_for_another_host_name_is_rejected(ca: RealStepCA) -> None:
    async with using(replace(ca.configuration(), url=f"https://127.0.0.1:{ca.port}")) as pair:
        error = await pair.failure()
    assert "TLS: the server's certificate is not for this host name" in str(error)


async def test_wrong_provisioner_or_key_is_explained(ca: RealStepCA, tmp_path: Path) -> None:
    """step-ca itself would return 401 without a reason."""
    async with using(ca.configuration(provisioner="cis")) as pair:
        assert "step-ca has no provisioner cis; it has csi (JWK), acme (ACME)" in str(await pair.failure())
    async with using(ca.configuration(provisioner="acme")) as pair:
        assert "acme has type ACME; expected JWK" in str(await pair.failure())
    other = tmp_path / "other.jwk"
    other.write_text(json.dumps(new_jwk()))
    async with using(ca.configuration(key=FileSource(str(other)))) as pair:
        error = str(await pair.failure())
        assert "IssuerUnavailable: issuer step: key: is another key" in error
        assert f"not {ca.jwk['kid']}" in error
    other.write_text(json.dumps({**new_jwk(), "kid": ca.jwk["kid"]}))
    async with using(ca.configuration(key=FileSource(str(other)))) as pair:
        assert "has the provisioner's kid" in str(await pair.failure())
        # Correcting the Secret needs no restart.
        other.write_text(ca.key_file.read_text())
        pair.verified_leaf(await pair.issue())


async def test_401_after_the_provisioner_got_another_key_is_explained(ca: RealStepCA) -> None:
    async with using(ca.configuration()) as pair:
        await pair.issue()
        ca.jwk = new_jwk()
        await ca.restart()
        error = str(await pair.failure())
        assert "step-ca rejected the authority's token (HTTP 401): key: is another key: its kid is" in error
        ca.key_file.write_text(json.dumps(ca.jwk))
        pair.verified_leaf(await pair.issue())


async def test_clock_skew_is_detected(ca: RealStepCA) -> None:
    async with using(ca.configuration(), clock=lambda: datetime.now(UTC) - timedelta(minutes=10)) as pair:
        problem = "clock: the clocks of the authority and step-ca differ by about 10 min; synchronize"
        assert problem in str(await pair.failure())


async def test_lifetime_outside_the_limits_is_rejected(tmp_path: Path) -> None:
    """By the authority if the provisioner has limits, or else by step-ca."""
    limits = {"minTLSCertDuration": "10m", "maxTLSCertDuration": "2h", "defaultTLSCertDuration": "1h"}
    async with RealStepCA(tmp_path / "limited", claims=limits) as ca, using(ca.configuration()) as pair:
        for text, lifetime in (("9m", timedelta(minutes=9)), ("3h", timedelta(hours=3))):
            error = await pair.failure(lifetime=lifetime)
            assert error.reason is Reason.NAME_NOT_ALLOWED
            assert f"duration: {text} is outside the limits of the provisioner, 10m to 2h" in str(error)
        assert '"path":"/1.0/sign"' not in ca.log.read_text().replace(" ", "")
        pair.verified_leaf(await pair.issue(lifetime=timedelta(hours=2)))
    async with RealStepCA(tmp_path / "usual") as ca, using(ca.configuration()) as pair:
        error = await pair.failure(lifetime=timedelta(hours=48))
        assert error.reason is Reason.NAME_NOT_ALLOWED
        text = "step-ca rejected the request: requested duration of 48h1m0s is more than the authorized maximum"
        assert text in str(error)


async def test_post_quantum_key_is_rejected(ca: RealStepCA) -> None:
    async with using(ca.configuration(), KeyType.ML_DSA_44) as pair:
        assert "key-type: step-ca signs only RSA, EC and Ed25519 keys" in str(await pair.failure())


async def test_restricted_usages_need_a_template(ca: RealStepCA, tmp_path: Path) -> None:
    """The default template adds both usages; such a certificate is rejected."""
    async with using(ca.configuration()) as pair:
        error = await pair.failure(usages=(Usage.SERVER,))
        assert error.reason is Reason.INVALID_RESPONSE
        assert "the certificate is for client and server, not for server" in str(error)
    options = {"x509": {"template": documented_template()}}
    async with (
        RealStepCA(tmp_path / "templated", options=options) as templated,
        using(templated.configuration()) as pair,
    ):
        for usages in ((Usage.SERVER,), (Usage.CLIENT,), ALL_USAGES):
            pair.verified_leaf(await pair.issue(usages=usages))


def documented_template() -> str:
    text = (Path(__file__).parents[2] / "docs" / "issuers.md").read_text()
    return text.split("<!-- template -->")[1].split("```")[1].removeprefix("json\n")


async def test_token_is_valid_for_one_csr_and_one_use(ca: RealStepCA) -> None:
    def captured() -> tuple[str, str]:
        to_sign = request(generate_key(KeyType.EC_P256))
        claims = token_claims(to_sign, ca.configuration(), f"nonce-{to_sign.csr.der.hex()[-9:]}")
        csr = x509.load_der_x509_csr(to_sign.csr.der).public_bytes(Encoding.PEM).decode()
        return csr, key.token(claims, to_sign.csr.der, datetime.now(UTC)).reveal()

    key = load_provisioner_key(Secret(ca.key_file.read_bytes()), None)
    (csr, token), (_, other_token) = captured(), captured()
    async with contextlib.aclosing(StepCAClient(ca.url, (ca.root,))) as attacker:
        assert [(await attacker.sign(csr, token, "1h")).status for _ in range(2)] == [201, 401]
        response = await attacker.sign(csr, other_token, "1h")
        assert response.status == 403
        assert "fingerprint does not match" in response.message


async def test_pods_trust_the_roots_of_federated_cas(tmp_path: Path) -> None:
    east, west = (RealStepCA(tmp_path / name, name=name.title()) for name in ("east", "west"))
    async with east, west, using(east.configuration()) as one, using(west.configuration()) as other:
        await one.issuer.diagnose()
        assert one.issuer.roots == (east.root_der,)
        east.federated = [west.root_file]
        await east.restart()
        await one.issuer.diagnose()
        assert set(one.issuer.roots) == {east.root_der, west.root_der}
        assert set((await one.issue()).roots) == {east.root_der, west.root_der}
        # A pod of the east verifies the certificate of a pod of the west.
        other.verified_leaf(await other.issue(), one.issuer.roots)


async def test_encrypted_key_is_read_from_a_file_or_from_step_ca(tmp_path: Path) -> None:
    password, key = tmp_path / "password", tmp_path / "key.jwe"
    password.write_text(PASSWORD + "\n")
    key.write_text(JWE)
    secret = FileSource(str(password))
    async with RealStepCA(tmp_path / "ca", jwk=JWK, encrypted_key=JWE) as ca:
        for source in (FileSource(str(key)), None):
            async with using(ca.configuration(key=source, password=secret)) as pair:
                pair.verified_leaf(await pair.issue())
        password.write_text("wrong")
        async with using(ca.configuration(key=None, password=secret)) as pair:
            assert "key: is encrypted with another password" in str(await pair.failure())


async def test_diagnosis_checks_everything_and_signs_nothing(ca: RealStepCA) -> None:
    findings = await StepCAIssuer("step", ca.configuration(), CredentialReader()).diagnose()
    subjects = ("reachable", "roots", "provisioner", "key", "lifetime", "clock")
    assert [(finding.subject, finding.ok) for finding in findings] == [(subject, True) for subject in subjects]
    assert ca.log.read_text().count('path="/1.0/sign"') == 0


async def test_errors_never_contain_the_key(ca: RealStepCA, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jwk"
    canary = "canary-d-of-the-key"
    for content in (json.dumps({**ca.jwk, "d": canary}), f'{{"d": "{canary}"', f"{canary}.a.b.c.d"):
        broken.write_text(content)
        async with using(ca.configuration(key=FileSource(str(broken)))) as pair:
            error = str(await pair.failure())
            assert "key: is" in error
            assert canary not in error
            assert canary not in repr(await pair.issuer.diagnose())
