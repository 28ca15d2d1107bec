"""Secrets that exist: when they get a new certificate, when they are left alone, and when they are not touched at all."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from csi_driver.core.certificates.keys import PrivateKey, encode_key, generate_key, public_bytes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from csi_driver.kube.client import ObjectName
from csi_driver.kube.tls_secrets.secret_client import SecretClient, SecretMetadata
from csi_driver.secrets.conditions import Condition
from tests.integration.secrets.conftest import World
from tests.support.scripted_authority import TestCA
from tests.support.tenant_api import TenantApi
from tests.support.waiting import until
from tests.unit.kube.collection import status_response

HOSTS = ["shop.example.com", "www.example.com"]
TLS = {"secretName": "tls", "hosts": HOSTS}
MANAGED = {"app.kubernetes.io/managed-by": "certmount"}
KEY = generate_key(KeyType.EC_P256)


def signed(
    ca: TestCA, *hosts: str, lifetime: timedelta = timedelta(days=90), key: PrivateKey = KEY
) -> dict[str, bytes]:
    """Return the data of a Secret with a certificate of the CA."""
    names = Names.of([DNSName.parse(host) for host in hosts or HOSTS])
    certificate = ca.sign(key.public_key(), names, lifetime).public_bytes(Encoding.PEM)
    return {"tls.crt": certificate, "tls.key": encode_key(key).reveal(), "ca.crt": ca.pem}


def put(world: World, data: dict[str, bytes], **annotations: str) -> None:
    """Store a Secret as if certmount had written it."""
    known = {"issuer": "internal", "environment": "internal", "condition": "Ready", **annotations}
    world.api.secret("shop/tls", data, MANAGED, {f"certmount.dev/{key}": value for key, value in known.items()})


def _valid(world: World) -> None:
    put(world, signed(world.authority.cas["internal"]))


def _not_parsable(world: World) -> None:
    put(world, {**signed(world.authority.cas["internal"]), "tls.crt": b"-----BEGIN CERTIFICATE-----\nAAAA\n"})


def _without_key(world: World) -> None:
    data = signed(world.authority.cas["internal"])
    del data["tls.key"]
    put(world, data)


def _key_mismatch(world: World) -> None:
    other = encode_key(generate_key(KeyType.EC_P256)).reveal()
    put(world, {**signed(world.authority.cas["internal"]), "tls.key": other})


def _too_few_names(world: World) -> None:
    put(world, signed(world.authority.cas["internal"], HOSTS[0]))


def _too_many_names(world: World) -> None:
    put(world, signed(world.authority.cas["internal"], *HOSTS, "old.example.com"))


def _older(world: World, age: timedelta, lifetime: timedelta) -> None:
    ca = world.authority.cas["internal"]
    ca.ahead = -age
    put(world, signed(ca, lifetime=lifetime))
    ca.ahead = timedelta()


def _expires_within_30_days(world: World) -> None:
    _older(world, timedelta(days=336), timedelta(days=365))


def _last_third_of_a_day(world: World) -> None:
    _older(world, timedelta(hours=17), timedelta(hours=24))


def _expired(world: World) -> None:
    _older(world, timedelta(hours=25), timedelta(hours=24))


def _other_issuer_by_annotation(world: World) -> None:
    put(world, signed(world.authority.cas["internal"]), issuer="letsencrypt")


def _other_issuer_by_chain(world: World) -> None:
    put(world, signed(TestCA("removed root")))


def _other_environment(world: World) -> None:
    put(world, signed(world.authority.cas["internal"]), environment="staging")


def _renewal_suggested(world: World) -> None:
    _valid(world)
    world.authority.renew_now = frozenset([hashlib.sha256(public_bytes(KEY.public_key())).hexdigest()])


WRONG = {
    Condition.NOT_PARSABLE: [_not_parsable, _without_key],
    Condition.KEY_MISMATCH: [_key_mismatch],
    Condition.NAMES_DIFFER: [_too_few_names, _too_many_names],
    Condition.EXPIRES_SOON: [_expires_within_30_days, _last_third_of_a_day, _expired],
    Condition.RENEWAL_SUGGESTED: [_renewal_suggested],
    Condition.OTHER_ENVIRONMENT: [_other_environment],
    Condition.OTHER_ISSUER: [_other_issuer_by_annotation, _other_issuer_by_chain],
}


@pytest.mark.parametrize(
    "condition,prepare", [(condition, one) for condition, several in WRONG.items() for one in several]
)
async def test_secret_made_wrong_by_hand_gets_a_new_certificate(
    condition: Condition, prepare: Callable[[World], None], world: World
) -> None:
    prepare(world)
    before = world.api.data("shop/tls")
    uid = world.api.secrets["shop/tls"]["metadata"]["uid"]
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.data("shop/tls")["tls.crt"] != before["tls.crt"], "the new certificate")
        await until(lambda: world.api.notes("shop", "CertificateIssued"), "the event")
        (note,) = world.api.notes("shop", "CertificateIssued")
        assert f"({condition.value}" in note
        assert world.api.secrets["shop/tls"]["metadata"]["uid"] == uid
        assert world.api.annotations("shop/tls")["environment"] == "internal"


async def test_other_key_type_after_an_edit_of_the_source(world: World) -> None:
    _valid(world)
    world.api.ingress("shop", "shop", TLS, annotations={"certmount.dev/key-type": "RSA-2048"})
    async with world.running():
        await until(lambda: world.api.notes("shop", "CertificateIssued"), "the event")
        assert (
            "the key has another type: EC-P256 in place of RSA-2048" in world.api.notes("shop", "CertificateIssued")[0]
        )
        leaf = x509.load_pem_x509_certificate(world.api.data("shop/tls")["tls.crt"])
        assert isinstance(leaf.public_key(), rsa.RSAPublicKey)


async def test_valid_certificate_is_left_alone_after_a_restart(world: World) -> None:
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await world.until_secret("shop/tls")
    before = copy.deepcopy(world.api.secrets["shop/tls"])
    world.authority.requests.clear()
    async with world.running():
        await until(lambda: world.metric("certmount_secrets_certificates", state="ready") == 1, "the check")
    assert world.api.secrets["shop/tls"] == before
    assert world.authority.requests == []


async def test_secret_of_someone_else_stays_untouched(world: World) -> None:
    """Its data are not even read."""
    world.api.secret("shop/tls", {"tls.crt": b"theirs", "tls.key": b"theirs"}, {"app": "other"})
    before = copy.deepcopy(world.api.secrets["shop/tls"])
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.reasons("shop"), "the event")
        (note,) = world.api.notes("shop", "SecretNotManaged")
        assert note == (
            "Secret shop/tls: Secret shop/tls: exists, and certmount did not create it; annotate it with "
            'certmount.dev/adopt: "true" to let certmount replace its contents, or use another name'
        )
        assert world.metric("certmount_secrets_failing", reason="SecretNotManaged") == 1
    assert world.api.secrets["shop/tls"] == before
    assert (world.api.reads_of_data, world.authority.requests) == ([], [])


async def test_secret_that_another_tool_replaces_during_a_check_stays_untouched(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_metadata = SecretClient.metadata

    async def replaced_afterwards(self: SecretClient, name: ObjectName) -> SecretMetadata | None:
        found = await read_metadata(self, name)
        if found is not None and found.managed:
            world.api.secret("shop/tls", {"tls.crt": b"theirs", "tls.key": b"theirs"}, {"app": "other"})
        return found

    monkeypatch.setattr(SecretClient, "metadata", replaced_afterwards)
    put(world, {"tls.crt": b"", "tls.key": b""})
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.reasons("shop"), "the event")
        assert world.api.notes("shop", "SecretNotManaged")
    assert world.api.data("shop/tls") == {"tls.crt": b"theirs", "tls.key": b"theirs"}
    assert world.authority.requests == []


async def test_secret_of_kube_lego_is_adopted_with_its_certificate(world: World) -> None:
    """Its RSA key in PKCS#1 stays until the renewal."""
    key = rsa.generate_private_key(65537, 2048)
    data = signed(world.authority.cas["internal"], key=key)
    data["tls.key"] = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    del data["ca.crt"]
    world.api.secret("shop/tls", data, annotations={"certmount.dev/adopt": "true"})
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: "SecretAdopted" in world.api.reasons("shop"), "the event")
    assert world.api.data("shop/tls") == {**data, "ca.crt": world.authority.cas["internal"].pem}
    assert world.api.secrets["shop/tls"]["metadata"]["labels"] == MANAGED
    assert world.api.annotations("shop/tls")["issuer"] == "internal"
    assert world.authority.requests == []


async def test_adopted_secret_that_is_not_valid_gets_a_new_certificate(world: World) -> None:
    world.api.secret("shop/tls", {"tls.crt": b"", "tls.key": b""}, annotations={"certmount.dev/adopt": "true"})
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.data("shop/tls")["tls.crt"] != b"", "the certificate")
    assert world.api.secrets["shop/tls"]["metadata"]["labels"] == MANAGED


async def test_secret_of_another_type_is_not_changed(world: World) -> None:
    world.api.secret("shop/tls", {"x": b"y"}, annotations={"certmount.dev/adopt": "true"}, kind="Opaque")
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.notes("shop", "InvalidSecretType"), "the event")
    assert world.api.data("shop/tls") == {"x": b"y"}


async def test_immutable_secret_gets_no_certificate_that_cannot_be_written(world: World) -> None:
    world.api.secret("shop/tls", {"tls.crt": b"", "tls.key": b""}, MANAGED)["immutable"] = True
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.notes("shop", "InvalidSecretType"), "the event")
    assert "is immutable, so its certificate cannot be renewed" in world.api.notes("shop", "InvalidSecretType")[0]
    assert world.authority.requests == []


async def test_namespace_without_the_role_gets_an_event_and_others_are_served(world: World) -> None:
    world.api.denied = {("get", "shop"), ("create", "shop"), ("patch", "shop")}
    world.api.ingress("shop", "shop", TLS)
    world.api.ingress("web", "web", TLS)
    async with world.running():
        await world.until_secret("web/tls")
        await until(lambda: world.api.notes("shop", "SecretAccessDenied"), "the event")
        assert (
            "apply the Role and RoleBinding certmount-secrets in namespace shop"
            in world.api.notes("shop", "SecretAccessDenied")[0]
        )
    assert [str(one.secret) for one in world.authority.requests] == ["web/tls"]


@pytest.mark.parametrize(
    "refusal, hint",
    [
        ("exceeded quota: few, requested: count/secrets=1", "raise the ResourceQuota of namespace shop"),
        ("unable to create new content in namespace shop because it is being terminated", ""),
        ('admission webhook "labels.example.com" denied the request: no label team', ""),
    ],
)
async def test_refusal_that_is_no_missing_permission_does_not_name_the_role(
    refusal: str, hint: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = status_response(403, f'secrets "tls" is forbidden: {refusal}')
    monkeypatch.setattr(TenantApi, "_create", lambda *_: response)
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.notes("shop", "SecretAccessDenied"), "the event")
    (note,) = world.api.notes("shop", "SecretAccessDenied")
    assert refusal in note
    assert hint in note
    assert "RoleBinding" not in note


async def test_change_of_the_environment_replaces_the_certificates_of_the_issuer(world: World) -> None:
    """As when an administrator changes the directory from staging to production."""
    world.settings = replace(world.settings, default_issuer="letsencrypt")
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        first = await world.until_secret("shop/tls")
        world.authority.environments["letsencrypt"] = "https://production.example/directory"
        world.authority.cas["letsencrypt"] = TestCA("production")
        world.authority.send_bundle()
        data = await world.until_secret("shop/tls", lambda: world.api.data("shop/tls") != first)
        assert data["ca.crt"] == world.authority.cas["letsencrypt"].pem
        assert world.api.annotations("shop/tls")["environment"] == "https://production.example/directory"


async def test_new_root_of_the_issuer_changes_only_the_roots(world: World) -> None:
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        first = await world.until_secret("shop/tls")
        old = world.authority.cas["internal"]
        world.authority.more_roots["internal"] = (TestCA("next").der,)
        world.authority.send_bundle()
        data = await world.until_secret("shop/tls", lambda: world.api.data("shop/tls") != first)
        assert data["ca.crt"].startswith(old.pem)
        assert data["ca.crt"].count(b"BEGIN CERTIFICATE") == 2
        assert (data["tls.crt"], data["tls.key"]) == (first["tls.crt"], first["tls.key"])


async def test_failed_renewal_is_a_condition_of_the_secret(world: World) -> None:
    _too_few_names(world)
    before = world.api.data("shop/tls")
    fault = Fault("www.example.com", "no policy rule allows this name")
    world.authority.failure = lambda _: CertmountError(Reason.NAME_NOT_ALLOWED, fault)
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.annotations("shop/tls")["condition"] != "Ready", "the condition")
        condition = "NameNotAllowed: www.example.com: no policy rule allows this name"
        assert world.api.annotations("shop/tls")["condition"] == condition
        assert world.api.data("shop/tls") == before
        other = Fault("www.example.com", "no policy rule allows this name for secret shop/tls")
        world.authority.failure = lambda _: CertmountError(Reason.NAME_NOT_ALLOWED, other)
        world.authority.policy_revision = "1b"
        world.authority.send_bundle()
        text = f"NameNotAllowed: {other}"
        await until(lambda: world.api.annotations("shop/tls")["condition"] == text, "the text of the new failure")
        world.authority.failure = lambda _: None
        world.authority.policy_revision = "2"
        world.authority.send_bundle()
        await until(lambda: world.api.annotations("shop/tls")["condition"] == "Ready", "the certificate")


async def test_metrics_have_a_certificate_that_was_never_renewed_by_this_replica(world: World) -> None:
    """As after a restart while the issuer is still working on its order, which is no failure and causes no other alert."""
    _expired(world)
    pending = CertmountError(Reason.ISSUANCE_PENDING, "the order is not ready")
    world.authority.failure = lambda _: pending
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.metric("certmount_secrets_certificates", state="pending") == 1, "the first attempt")
        assert world.metric("certmount_secrets_certificates_expired") == 1
        assert world.metric("certmount_secrets_certificates", state="ready") == 0
        world.authority.failure = lambda _: None
        await until(lambda: world.metric("certmount_secrets_certificates", state="ready") == 1, "the certificate")
        assert world.metric("certmount_secrets_certificates_expired") == 0
