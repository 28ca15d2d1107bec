"""A source that is not valid for a while does not leave its Secrets to other sources, or without renewals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography import x509

from csi_driver.core.names import DNSName
from tests.integration.secrets.conftest import World
from tests.support.waiting import until

LISTED, OTHER = "listed.example.com", "other.example.com"
VALID = f"- {{secret: web/listed, domains: [{LISTED}]}}\n- {{secret: web/second, domains: [second.example.com]}}\n"


def names(world: World, secret: str) -> list[str]:
    leaf = x509.load_pem_x509_certificate(world.api.data(secret)["tls.crt"])
    return [
        DNSName.parse(name).text
        for name in leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.DNSName
        )
    ]


@pytest.mark.parametrize(
    "text",
    [
        "- secret: [\n",
        "certificates: 7\n",
        "#" * (512 * 1024 + 1),
        VALID.replace(LISTED, "not_a_name"),
        VALID.replace(f"[{LISTED}]", "[]"),
        VALID.replace(f"domains: [{LISTED}]", f"domain: [{LISTED}]"),
    ],
    ids=["yaml", "no list", "too long", "name", "no name", "key"],
)
async def test_list_that_is_not_valid_for_a_while_keeps_its_secrets(world: World, text: str) -> None:
    """Otherwise, a tenant's Ingress that names the same Secret would replace the administrator's certificate."""
    world.settings = replace(world.settings, lists=(("shop", "list"),))
    world.api.certificate_list("shop", "list", VALID)
    async with world.running():
        await world.until_secret("web/listed")
        await world.until_secret("web/second")
        world.api.certificate_list("shop", "list", text)
        await until(lambda: "InvalidSource" in world.api.reasons("list"), "the event on the list")
        world.api.ingress("web", "tenant", {"secretName": "listed", "hosts": [OTHER]})
        world.api.ingress("web", "last", {"secretName": "last", "hosts": [OTHER]})
        await world.until_secret("web/last")
        await until(lambda: "InvalidSource" in world.api.reasons("tenant"), "the event on the Ingress")
        assert world.metric("certmount_secrets_certificates", state="ready") == 3
        # An entry that is removed, and a list that is deleted, are no faults.
        world.api.certificate_list("shop", "list", VALID.splitlines()[1])
        await until(lambda: names(world, "web/listed") == [OTHER], "the tenant's certificate")
