"""A certificate that could not be written, or whose write had no response: it is written later only if it is still valid."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import ObjectName
from csi_driver.kube.tls_secrets.secret_client import SecretClient, SecretMetadata, SecretUpdate
from tests.integration.secrets.conftest import World
from tests.support.scripted_authority import TestCA
from tests.support.waiting import until

TLS = {"secretName": "tls", "hosts": ["shop.example.com"]}


async def test_certificate_is_written_when_the_role_is_applied(world: World) -> None:
    world.api.denied = {("create", "shop")}
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.notes("shop", "SecretAccessDenied"), "the event")
        world.api.denied = set()
        world.authority.policy_revision = "2"
        world.authority.send_bundle()
        await world.until_secret("shop/tls")
    assert len(world.authority.requests) == 1


async def test_certificate_of_a_removed_root_is_not_written(world: World) -> None:
    world.api.denied = {("create", "shop")}
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        await until(lambda: world.api.notes("shop", "SecretAccessDenied"), "the event")
        world.authority.cas["internal"] = TestCA("after an emergency")
        world.api.denied = set()
        world.authority.send_bundle()
        data = await world.until_secret("shop/tls")
    assert data["ca.crt"] == world.authority.cas["internal"].pem
    assert len(world.authority.requests) == 2


@pytest.mark.parametrize("event", ["the CA suggests renewal", "the Secret is deleted"])
async def test_renewal_after_a_write_without_response_has_a_new_key(
    event: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of a Secret that is deleted may have been stolen, and the certificate that is to be renewed was revoked."""
    create = SecretClient.create

    async def without_response(self: SecretClient, name: ObjectName, update: SecretUpdate) -> SecretMetadata:
        monkeypatch.setattr(SecretClient, "create", create)
        await create(self, name, update)
        raise CertmountError(Reason.API_SERVER_UNAVAILABLE, Fault(str(name), "the API server does not respond in time"))

    monkeypatch.setattr(SecretClient, "create", without_response)
    world.api.ingress("shop", "shop", TLS)
    async with world.running():
        first = await world.until_secret("shop/tls")
        await until(lambda: world.metric("certmount_secrets_certificates", state="ready") == 1, "the next check")
        if event == "the Secret is deleted":
            del world.api.secrets["shop/tls"]
            world.authority.more_roots["internal"] = (TestCA("next").der,)  # leads to a check
        else:
            public = load_pem_private_key(first["tls.key"], None).public_key()
            world.authority.renew_now = frozenset([hashlib.sha256(public_bytes(public)).hexdigest()])  # type: ignore[arg-type]  # an EC key
        world.authority.send_bundle()
        data = await world.until_secret("shop/tls", lambda: world.api.data("shop/tls")["tls.crt"] != first["tls.crt"])
    assert data["tls.key"] != first["tls.key"]
