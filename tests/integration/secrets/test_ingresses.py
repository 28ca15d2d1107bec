"""Ingresses get their Secrets."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.integration.secrets.conftest import World
from tests.support.waiting import until

TLS = {"secretName": "mysql-tls", "hosts": ["phpmyadmin.example.com", "mysql.example.com"]}
POSTGRES = {"secretName": "postgres-tls", "hosts": ["postgres.example.com"]}


async def test_example_of_kube_lego(world: World) -> None:
    """Each entry of spec.tls gets its own Secret."""
    world.api.ingress("shop", "databases", TLS, POSTGRES)
    async with world.running():
        data = await world.until_secret("shop/mysql-tls")
        await world.until_secret("shop/postgres-tls")
        leaf = x509.load_pem_x509_certificate(data["tls.crt"])
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == TLS["hosts"]
        assert data["tls.key"].startswith(b"-----BEGIN PRIVATE KEY-----\n")
        assert load_pem_private_key(data["tls.key"], None).public_key() == leaf.public_key()
        assert data["ca.crt"] == world.authority.cas["internal"].pem
        secret = world.api.secrets["shop/mysql-tls"]
        assert secret["type"] == "kubernetes.io/tls"
        assert secret["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "certmount"}
        assert world.api.annotations("shop/mysql-tls") == {
            "serial": f"{leaf.serial_number:x}",
            "not-after": f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
            "issuer": "internal",
            "environment": "internal",
            "source": "Ingress/shop/databases",
            "condition": "Ready",
        }
        await until(lambda: world.api.reasons("databases") == ["CertificateIssued"] * 2, "the events")
        assert world.metric("certmount_secrets_certificates", state="ready") == 2
        assert world.metric("certmount_secrets_leader") == 1
