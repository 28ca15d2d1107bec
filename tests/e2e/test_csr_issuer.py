"""Volumes whose issuer is a signer of the cluster: the authority creates the CertificateSigningRequests."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver._proto import authority_pb2
from csi_driver.core.certificates.csr import build_csr, names_of
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.spec import KeyType
from tests.e2e import authority, cluster
from tests.e2e.csr import PATH, documented, names
from tests.e2e.logs import AUTHORITY, LogCollector
from tests.e2e.pods import Pod, manifest
from tests.unit.core import pki

NAMESPACE = "e2e-csr-issuer"
NAME = f"pod.{NAMESPACE}.svc"
SPIFFE_ID = f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"
ISSUERS = """
issuers:
- name: own
  kubernetes_csr: {signer: certmount.dev/pod}
- name: approved
  kubernetes_csr: {signer: certmount.dev/pod, approve: true, max_duration: 2h}
- name: corporate
  kubernetes_csr:
    signer: example.com/pods
    approve: true
    roots: {secret: certmount/corporate-roots, key: ca.crt}
- name: by-hand
  kubernetes_csr: {signer: example.com/pods, roots: {secret: certmount/corporate-roots, key: ca.crt}}
"""
RULE = {
    "match": {"namespaces": [NAMESPACE], "serviceAccounts": ["*"]},
    "allow": {
        "dns": ["*.{namespace}.svc"],
        "issuers": ["internal", "own", "approved", "corporate", "by-hand"],
        "max_duration": "4h",
    },
}
REQUESTS = 200


class CorporateSigner:
    """A signer that does not know certmount. It signs approved requests and never deletes them."""

    def __init__(self) -> None:
        self.root = pki.authority("corporate", validity=pki.Validity(timedelta(days=-3650), timedelta(days=3650)))
        self.signed: list[str] = []

    def sign_approved(self) -> None:
        for csr in cluster.find("csr", "--field-selector", "spec.signerName=example.com/pods"):
            status, name = csr["status"], csr["metadata"]["name"]
            approved = any(condition["type"] == "Approved" for condition in status.get("conditions", ()))
            if not approved or "certificate" in status:
                continue
            request = x509.load_pem_x509_csr(base64.b64decode(csr["spec"]["request"]))
            pem = encode_certificates([self._leaf(request, csr["spec"]["expirationSeconds"]), self.root.certificate])
            csr["status"] = {**status, "certificate": base64.b64encode(pem).decode()}
            cluster.kubectl("replace", "--raw", f"{PATH}/{name}/status", "-f", "-", text=json.dumps(csr))
            self.signed.append(name)

    def _leaf(self, request: x509.CertificateSigningRequest, seconds: int) -> x509.Certificate:
        now = datetime.now(UTC)
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        san = request.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        builder = x509.CertificateBuilder().subject_name(request.subject).issuer_name(self.root.certificate.subject)
        return (
            builder.public_key(request.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(seconds=seconds))
            .add_extension(san.value, critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .sign(self.root.key, SHA256())
        )


@pytest.fixture(scope="module")
def corporate() -> Iterator[CorporateSigner]:
    signer = CorporateSigner()
    root = signer.root.certificate.public_bytes(Encoding.PEM).decode()
    rules = ("--resource=secrets", "--resource-name=corporate-roots", "--verb=get")
    account = ("--serviceaccount=certmount:certmount-authority",)
    cluster.kubectl(
        "-n", cluster.CERTMOUNT, "create", "secret", "generic", "corporate-roots", f"--from-literal=ca.crt={root}"
    )
    cluster.kubectl("-n", cluster.CERTMOUNT, "create", "role", "corporate-roots", *rules)
    cluster.kubectl(
        "-n", cluster.CERTMOUNT, "create", "rolebinding", "corporate-roots", "--role=corporate-roots", *account
    )
    yield signer
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "secret,role,rolebinding", "corporate-roots")


@pytest.fixture(scope="module", autouse=True)
def issuers(corporate: CorporateSigner) -> Iterator[None]:  # noqa: ARG001  # creates the Secret with the roots
    """The issuers, with the documented roles."""
    cluster.create_namespace(NAMESPACE)
    cluster.apply(*documented("ClusterRole"), *documented("ClusterRoleBinding"))
    with cluster.restored_configuration():
        cluster.patch_config_map("certmount-issuers", {"issuers.yaml": ISSUERS})
        cluster.change_policy(lambda policy: policy["policy"].append(RULE))
        cluster.restart_authority()
        yield
    cluster.delete_namespace(NAMESPACE)


def _remaining_requests() -> list[str]:
    """Return the requests of issuers that still exist."""
    return [csr["metadata"]["name"] for csr in cluster.find("csr", "-l", "app.kubernetes.io/managed-by=certmount")]


def test_issuer_check_finds_no_problem() -> None:
    """The documented roles contain all permissions that the check verifies."""
    output = cluster.kubectl(
        "-n", cluster.CERTMOUNT, "exec", "deploy/certmount-authority", "--", "certmount", "issuer", "check"
    )
    assert "FAIL" not in output, output
    assert "the authority can approve requests for certmount.dev/pod" in output


@pytest.mark.timeout(180)
@pytest.mark.parametrize("issuer,uri", [("own", ""), ("approved", SPIFFE_ID)])
def test_volume_with_the_authoritys_own_signer(issuer: str, uri: str) -> None:
    """The authority creates the request, and its signer accepts it because the API server recorded the authority as requester."""
    pod = Pod(NAMESPACE, f"volume-{issuer}")
    cluster.apply(
        manifest(pod, {"name": NAME, "issuer": issuer, "duration": "1h", **({"uri-sans": uri} if uri else {})})
    )
    pod.wait_until_ready(120)
    assert names_of(pod.certificate().extensions) == names(NAME, *([uri] if uri else []))
    assert pod.read("root.crt").encode() == authority.root()
    assert cluster.wait_until(lambda: not _remaining_requests(), seconds=10, what="no remaining requests")


@pytest.mark.timeout(240)
def test_volume_with_any_signer_of_the_cluster(corporate: CorporateSigner) -> None:
    """The authority approves the request, or a person does so after the publish call has ended; one request is enough."""
    approved, by_hand = Pod(NAMESPACE, "corporate"), Pod(NAMESPACE, "by-hand")
    cluster.apply(*(manifest(pod, {"name": NAME, "issuer": pod.name, "duration": "1h"}) for pod in (approved, by_hand)))

    def ready_after_signing(pod: Pod) -> bool:
        corporate.sign_approved()
        conditions = pod.get()["status"]["conditions"]
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    cluster.wait_until(lambda: ready_after_signing(approved), seconds=60, what="a certificate of the corporate signer")
    assert approved.read("root.crt").encode() == encode_certificates([corporate.root.certificate])
    assert names_of(approved.certificate().extensions) == names(NAME)

    (event, *_) = cluster.wait_until(
        lambda: cluster.events_of(by_hand.name, NAMESPACE, reason="IssuancePending"),
        seconds=60,
        what="an IssuancePending event",
    )
    (name,) = _remaining_requests()
    assert f"kubectl certificate approve {name}" in event["message"]
    cluster.kubectl("certificate", "approve", name)
    cluster.wait_until(lambda: ready_after_signing(by_hand), seconds=120, what="the certificate that a person approved")
    assert corporate.signed[-1] == name
    assert not _remaining_requests()


@pytest.mark.timeout(300)
def test_two_hundred_requests_are_deleted_once_issued(logs: LogCollector) -> None:
    pods = [Pod(NAMESPACE, f"many-{number}") for number in range(4)]
    cluster.apply(*(manifest(pod, {}) for pod in pods))
    cluster.wait_for("Ready", *(f"pod/{pod.name}" for pod in pods), namespace=NAMESPACE)
    metadata = (("authorization", f"Bearer {authority.node_token()}"),)
    tokens = [authority.pod_token(NAMESPACE, pod.name) for pod in pods]
    with authority.connected() as stub:

        def issue(number: int) -> bytes:
            csr = build_csr(generate_key(KeyType.EC_P256), names(NAME))
            token = tokens[number % len(tokens)]
            request = authority_pb2.IssueRequest(csr=csr, pod_token=token, issuer="own")
            request.duration.FromSeconds(3600)
            chain: Sequence[bytes] = stub.Issue(request, timeout=60, metadata=metadata).chain
            return chain[0]

        with ThreadPoolExecutor(10) as threads:
            leaves = list(threads.map(issue, range(REQUESTS)))
    assert len({x509.load_der_x509_certificate(leaf).serial_number for leaf in leaves}) == REQUESTS
    assert cluster.wait_until(lambda: not _remaining_requests(), seconds=10, what="no remaining requests")
    rules = ["the authority's earlier decision"]
    issued: set[Any] = {event["csr"] for event in logs.events(AUTHORITY) if event.get("rules") == rules}
    assert len(issued) >= REQUESTS
