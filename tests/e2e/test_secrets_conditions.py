"""Secrets on the real API server: what makes the controller request a new certificate, and what it leaves alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.spec import KeyType
from tests.e2e import authority, cluster, host, secrets
from tests.e2e.secrets import NO_ROLE, OWN
from tests.peers.test_acme_docs import documents

pytestmark = pytest.mark.usefixtures("secrets_controller")

DAY = timedelta(days=1)


def name_of(secret: str, namespace: str = OWN) -> str:
    return f"{secret}.{namespace}.example.com"


def pair(name: str, *, begin: timedelta = -DAY, end: timedelta = 89 * DAY) -> dict[str, str]:
    """Return the data of a Secret with a new key, and a certificate of the internal CA that certmount did not issue."""
    stored = {key: base64.b64decode(value) for key, value in cluster.get("secret", "certmount-ca")["data"].items()}
    ca = x509.load_pem_x509_certificates(stored["intermediate.crt"])[0]
    key, now = generate_key(KeyType.EC_P256), datetime.now(UTC)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begin)
        .not_valid_after(now + end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .sign(load_pem_private_key(stored["intermediate.key"], None), SHA256())  # type: ignore[arg-type]  # an EC key
    )
    pem = {
        "tls.crt": leaf.public_bytes(Encoding.PEM) + ca.public_bytes(Encoding.PEM),
        "tls.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    return {file: encoded(content) for file, content in pem.items()}


def patch(secret: str, change: dict[str, Any]) -> None:
    cluster.kubectl("-n", OWN, "patch", "secret", secret, "--type=merge", "-p", json.dumps(change))


def put_data(secret: str, data: dict[str, str]) -> None:
    patch(secret, {"data": data})


def encoded(text: bytes) -> str:
    return base64.b64encode(text).decode()


def use_hosts(secret: str, *names: str) -> None:
    cluster.apply(secrets.ingress(secret, OWN, {secret: names}))


def names_after(secret: str) -> list[str]:
    """Return the names that the Secret must have at the end."""
    return [name_of(secret), *(["www-" + name_of(secret)] if secret == "fewer-names-than-the-ingress" else [])]


# What an administrator or a tenant does to a Secret, or to its Ingress, by the name of the Secret.
SPOILED: dict[str, Callable[[str], object]] = {
    "missing": lambda secret: cluster.kubectl("-n", OWN, "delete", "secret", secret),
    "no-certificate": lambda secret: put_data(secret, {"tls.crt": encoded(b"no certificate")}),
    "no-key": lambda secret: put_data(secret, {"tls.key": encoded(b"no key")}),
    "another-key": lambda secret: put_data(secret, {"tls.key": pair(name_of(secret))["tls.key"]}),
    "expires-soon": lambda secret: put_data(secret, pair(name_of(secret), begin=-80 * DAY, end=10 * DAY)),
    "expired": lambda secret: put_data(secret, pair(name_of(secret), begin=-80 * DAY, end=-DAY)),
    "other-names": lambda secret: put_data(secret, pair("other-" + name_of(secret))),
    "fewer-names-than-the-ingress": lambda secret: use_hosts(secret, *names_after(secret)),
    "more-names-than-the-ingress": lambda secret: use_hosts(secret, name_of(secret)),
    "staging": lambda secret: patch(secret, {"metadata": {"annotations": {"certmount.dev/environment": "staging"}}}),
}


@pytest.fixture(scope="module")
def first() -> dict[str, x509.Certificate]:
    """The certificate of one Secret for each way to spoil it."""
    names = {name: [name_of(name)] for name in (*SPOILED, "untouched")}
    names["more-names-than-the-ingress"].append("www-" + name_of("more-names-than-the-ingress"))
    cluster.apply(*(secrets.ingress(name, OWN, {name: hosts}) for name, hosts in names.items()))
    return {name: secrets.certificate(secrets.wait_for_certificate(name, OWN, *hosts)) for name, hosts in names.items()}


def test_example_overlay_grants_no_cluster_wide_permission() -> None:
    """As rendered by kubectl: Roles in the named namespaces only, and one image for all components."""
    rendered = cluster.kubectl("kustomize", str(secrets.DEPLOY / "overlay-example-secrets"))
    objects = list(yaml.safe_load_all(rendered))
    bound = [
        (one["kind"], one["metadata"].get("namespace"))
        for one in objects
        for subject in one.get("subjects", ())
        if subject["name"] == secrets.DEPLOYMENT
    ]
    assert sorted(bound) == [("RoleBinding", cluster.CERTMOUNT), ("RoleBinding", "shop"), ("RoleBinding", "shop")]
    wide = [rule for one in objects if one["kind"] == "ClusterRole" for rule in one["rules"]]
    assert not [rule for rule in wide if "secrets" in rule["resources"]]
    workloads = {one["metadata"]["name"]: one for one in objects if one["kind"] in ("Deployment", "DaemonSet")}
    containers = {name: one["spec"]["template"]["spec"]["containers"][0] for name, one in workloads.items()}
    assert {container["image"] for container in containers.values()} == {"localhost/certmount:dev"}
    assert "--secrets-service-account=certmount/certmount-secrets" in containers["certmount-authority"]["args"]


@pytest.mark.timeout(120)
def test_secret_has_everything_that_the_page_lists(first: dict[str, x509.Certificate]) -> None:
    secret = secrets.read("untouched", OWN)
    assert secret["type"] == "kubernetes.io/tls"
    assert secret["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "certmount"
    assert secrets.decoded(secret, "ca.crt") == authority.root()
    notes = {key.removeprefix("certmount.dev/"): value for key, value in secret["metadata"]["annotations"].items()}
    leaf = first["untouched"]
    assert int(notes["serial"].replace(":", ""), 16) == leaf.serial_number
    assert datetime.fromisoformat(notes["not-after"]) == leaf.not_valid_after_utc
    assert (notes["issuer"], notes["source"], notes["condition"]) == ("internal", f"Ingress/{OWN}/untouched", "Ready")
    writers = "jsonpath={.metadata.managedFields[*].manager}"
    found = cluster.kubectl("-n", OWN, "get", "secret", "untouched", "--show-managed-fields", "-o", writers)
    assert found == "certmount"
    assert secrets.wait_for_event("untouched", OWN, "CertificateIssued")
    status = ("certmount", "secrets", "status", "--output=json")
    rows = json.loads(cluster.kubectl("-n", cluster.CERTMOUNT, "exec", f"deploy/{secrets.DEPLOYMENT}", "--", *status))
    (row,) = [row for row in rows if row["secret"] == "untouched"]
    assert (row["state"], row["expires"], row["names"]) == ("ready", notes["not-after"], [name_of("untouched")])


@pytest.mark.timeout(180)
def test_after_a_restart_spoiled_secrets_get_new_certificates_and_others_do_not(
    first: dict[str, x509.Certificate],
) -> None:
    """A Secret that is valid keeps even its version."""
    for name, spoil in SPOILED.items():
        spoil(name)
    before = secrets.read("untouched", OWN)
    secrets.restart()
    for name in SPOILED:
        secrets.wait_for_certificate(name, OWN, *names_after(name), other_than=first[name], seconds=60)
    assert secrets.read("untouched", OWN) == before
    assert host.metric(secrets.leader(), "certmount_secrets_issued_total") == len(SPOILED)


@pytest.mark.timeout(90)
def test_gateway_gets_a_secret_for_its_listeners() -> None:
    """It is the Gateway of the page, with a name of the tests."""
    (gateway,) = [one for one in documents("secrets.md") if one.get("kind") == "Gateway"]
    gateway["metadata"] |= {"namespace": OWN, "name": "edge"}
    gateway["metadata"]["annotations"]["certmount.dev/issuer"] = "internal"
    gateway["spec"]["listeners"][0]["hostname"] = name_of("gateway")
    cluster.apply(gateway)
    secret = secrets.wait_for_certificate("shop-tls", OWN, name_of("gateway"))
    assert secret["metadata"]["annotations"]["certmount.dev/source"] == f"Gateway/{OWN}/edge"
    assert secrets.wait_for_event("edge", OWN, "CertificateIssued")


def _other_tools_secret(name: str, data: dict[str, str], kind: str = "kubernetes.io/tls", **annotations: str) -> Any:
    metadata = {"name": name, "namespace": OWN, "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind, "data": data}


@pytest.mark.timeout(120)
def test_only_secrets_with_the_annotation_are_adopted() -> None:
    """A valid certificate of another tool stays, one that expires soon is replaced. Other Secrets are never changed."""
    pairs = {name: pair(name_of(name)) for name in ("kept", "foreign")}
    pairs["replaced"] = pair(name_of("replaced"), begin=-80 * DAY, end=10 * DAY)
    cluster.apply(*(_other_tools_secret(name, data) for name, data in pairs.items()))
    cluster.apply(_other_tools_secret("opaque", {"tls.crt": encoded(b"their data")}, kind="Opaque"))
    cluster.kubectl("-n", OWN, "annotate", "secret", "kept", "replaced", "opaque", "certmount.dev/adopt=true")
    before = {name: secrets.read(name, OWN) for name in ("foreign", "opaque")}
    cluster.apply(*(secrets.ingress(name, OWN, {name: [name_of(name)]}) for name in (*pairs, "opaque")))

    old = x509.load_pem_x509_certificates(base64.b64decode(pairs["replaced"]["tls.crt"]))[0]
    secrets.wait_for_certificate("replaced", OWN, name_of("replaced"), other_than=old)
    assert secrets.wait_for_event("kept", OWN, "SecretAdopted")
    kept = secrets.read("kept", OWN)
    assert {key: kept["data"][key] for key in pairs["kept"]} == pairs["kept"]
    assert kept["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "certmount"
    assert "certmount.dev/adopt" in secrets.wait_for_event("foreign", OWN, "SecretNotManaged")
    assert "kubernetes.io/tls" in secrets.wait_for_event("opaque", OWN, "InvalidSecretType")
    assert {name: secrets.read(name, OWN) for name in before} == before


@pytest.mark.timeout(180)
def test_namespace_without_the_role_gets_an_event_and_no_effect() -> None:
    """Nothing happens without any permission. With the Role except for Secrets, an event says what is missing."""
    cluster.apply(
        secrets.ingress("site", NO_ROLE, {"site": [name_of("site", NO_ROLE)]}),
        secrets.ingress("neighbour", OWN, {"neighbour": [name_of("neighbour")]}),
    )
    secrets.wait_for_certificate("neighbour", OWN, name_of("neighbour"))
    directory = secrets.DEPLOY / "components" / "secrets-namespace"
    role, binding = yaml.safe_load_all((directory / "role.yaml").read_text())
    for one in (role, binding):
        one["metadata"]["namespace"] = NO_ROLE
    without = {**role, "rules": [rule for rule in role["rules"] if rule["resources"] != ["secrets"]]}
    cluster.apply(without, binding)
    assert "Secret" in secrets.wait_for_event("site", NO_ROLE, "SecretAccessDenied", seconds=90)
    assert cluster.find("secrets", namespace=NO_ROLE) == []
    cluster.apply(role)
    secrets.wait_for_certificate("site", NO_ROLE, name_of("site", NO_ROLE), seconds=60)
