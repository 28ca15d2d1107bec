"""Volumes for cert-manager's csi-driver, with a real driver: published, restored after a restart, and refused."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from csi_driver.core.cert_manager import PREFIX
from tests.integration.node.world import Node, failure_of
from tests.support.kubelet import FakePod

pytestmark = pytest.mark.asyncio(loop_scope="module")

ATTRIBUTES = {
    "issuer-name": "internal",
    "issuer-kind": "ClusterIssuer",
    "dns-names": "${POD_NAME}.${POD_NAMESPACE}.svc",
    "certificate-file": "server.crt",
    "key-usages": "server auth, client auth, digital signature",
}


async def test_volume_is_published_and_restored(node: Node) -> None:
    attributes = {PREFIX + key: value for key, value in ATTRIBUTES.items()}
    request = await node.published(FakePod(name="db-0"), attributes)
    target = node.target(request)
    files = {path.name for path in target.iterdir() if not path.name.startswith("..")}
    assert files == {"server.crt", "tls.key", "ca.crt", "generation.json"}
    key = load_pem_private_key((target / "tls.key").read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    (leaf, *_) = x509.load_pem_x509_certificates((target / "server.crt").read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["db-0.web.svc"]
    state = node.state(request)
    await node.restart()
    await node.publish(request)
    assert node.state(request) == state, "the volume was restored, not issued again"
    assert node.record(request)["attributes"] == attributes


async def test_refused_volume_names_the_attribute_of_the_user(node: Node) -> None:
    failure = await failure_of(node.publish(node.request(attributes={f"{PREFIX}is-ca": "true"})))
    assert failure.text == (
        f"InvalidAttributes: volumeAttributes.{PREFIX}is-ca: certmount never issues CA certificates to pods; "
        'remove it, or write "false"'
    )
