"""CertificateSigningRequests that pods create at a real API server for the authority's signer."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import urllib.error
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.authority.issuers.external_issuer import ends_at_root
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import generate_key, load_key, public_bytes
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from tests.e2e import authority, cluster, host
from tests.e2e.csr import (
    ACCOUNT,
    DOCS,
    NAME,
    NAMESPACE,
    POD,
    SIGNER,
    SPIFFE_ID,
    USAGES,
    Request,
    changed_csr,
    condition_of,
    create_as,
    create_as_pod,
    create_with_token,
    csr_pem,
    names,
    recorded_extra,
    wait_until_processed,
)
from tests.e2e.logs import AUTHORITY, LogCollector
from tests.e2e.pods import Pod, manifest, service

FOREIGN_NAME = "shop.example.com"


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    cluster.create_namespace(NAMESPACE)
    resource = "--resource=certificatesigningrequests.certificates.k8s.io"
    groups = (f"--group=system:serviceaccounts:{NAMESPACE}", "--group=system:authenticated")
    cluster.kubectl("delete", "clusterrolebinding,clusterrole", "e2e-csr", "--ignore-not-found")
    cluster.kubectl("create", "clusterrole", "e2e-csr", "--verb=create,get,watch", resource)
    cluster.kubectl("create", "clusterrolebinding", "e2e-csr", "--clusterrole=e2e-csr", *groups)
    cluster.apply(manifest(POD, {}))
    POD.wait_until_ready()
    yield
    cluster.kubectl("delete", "csr", "--all")
    cluster.kubectl("delete", "clusterrolebinding,clusterrole", "e2e-csr")
    cluster.delete_namespace(NAMESPACE)


def test_request_with_a_pods_token_gets_a_certificate(logs: LogCollector) -> None:
    """The internal CA signs the names that the policy allows and the pod's SPIFFE ID. The condition shows the rule."""
    key = generate_key(KeyType.EC_P256)
    name = create_as_pod(Request(csr_pem(NAME, key=key)))
    csr = wait_until_processed(name)
    kind, reason, message = condition_of(csr)
    assert (kind, reason) == ("Approved", "PolicyAllows")
    assert NAME in message
    assert "policy[0]" in message
    chain = decode_certificates(base64.b64decode(csr["status"]["certificate"]))
    leaf, *rest = chain
    assert names_of(leaf.extensions) == names(NAME, SPIFFE_ID)
    assert public_bytes(leaf.public_key()) == public_bytes(key.public_key())  # type: ignore[arg-type]  # an EC key
    assert timedelta(minutes=59) < leaf.not_valid_after_utc - leaf.not_valid_before_utc < timedelta(minutes=62)
    roots = [root.public_bytes(Encoding.DER) for root in decode_certificates(authority.root())]
    leaf.verify_directly_issued_by(rest[0])
    assert ends_at_root(chain, roots)
    row = cluster.kubectl("get", "csr", name, "--no-headers").split()
    assert (row[2], row[3], row[5]) == (SIGNER, ACCOUNT, "Approved,Issued")

    def audit() -> Any:
        return [event for event in logs.events(AUTHORITY) if event.get("csr") == name]

    (line,) = cluster.wait_until(audit, seconds=10, what="an audit log line")
    assert (line["decision"], line["pod"], line["serial"]) == ("issued", POD.name, f"{leaf.serial_number:x}")


def _wrong_signature() -> bytes:
    der = bytearray(x509.load_pem_x509_csr(csr_pem(NAME)).public_bytes(Encoding.DER))
    der[-1] ^= 1
    body = base64.encodebytes(bytes(der)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n".encode()


def _with_subject(oid: x509.ObjectIdentifier, value: str) -> Request:
    return Request(changed_csr(subject=[x509.NameAttribute(oid, value)]))


def _with_extension(extension: x509.ExtensionType, *, critical: bool = False) -> Request:
    return Request(changed_csr(lambda csr: csr.add_extension(extension, critical=critical)))


_CODE_SIGNING = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
_UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
_CA = x509.BasicConstraints(ca=True, path_length=None)
_FORGED_NOTES: dict[str, Any] = {
    "labels": {"certmount.dev/issuer": "own", "certmount.dev/order": "0"},
    "annotations": {"certmount.dev/pod": "certmount/certmount-authority", "certmount.dev/names": FOREIGN_NAME},
}
_FORGED_REQUESTER = {
    "username": "system:serviceaccount:certmount:certmount-authority",
    "groups": ["system:masters"],
}
_FOREIGN_ID = "spiffe://cluster.local/ns/kube-system/sa/admin"
_RESERVED = "is reserved for Kubernetes"
_INVALID: dict[str, tuple[Request, str]] = {
    "two blocks": (Request(csr_pem(NAME) * 2), "not exactly one PEM block"),
    "text before the block": (Request(b"hello\n" + csr_pem(NAME)), "not exactly one PEM block"),
    "a wrong signature": (Request(_wrong_signature()), "has an invalid signature"),
    "another curve": (Request(changed_csr(curve=ec.SECP224R1())), "has an unsupported key type"),
    "code signing": (Request(csr_pem(NAME), (*USAGES, "code signing")), "code signing is not allowed for pods"),
    "cert sign": (Request(csr_pem(NAME), (*USAGES, "cert sign")), "cert sign is not allowed for pods"),
    "no TLS usage": (Request(csr_pem(NAME), ("digital signature",)), "neither server auth nor client auth"),
    "a CA flag": (_with_extension(_CA, critical=True), "BasicConstraints: requests a CA certificate"),
    "an unknown extension": (_with_extension(_UNKNOWN), "extension 1.3.6.1.4.1.99999.1"),
    "a usage in the CSR": (_with_extension(_CODE_SIGNING), "extension ExtendedKeyUsage"),
    "a user of Kubernetes": (
        _with_subject(NameOID.COMMON_NAME, "system:kube-controller-manager"),
        f"'system:kube-controller-manager' {_RESERVED}",
    ),
    "a group of Kubernetes": (
        _with_subject(NameOID.ORGANIZATION_NAME, "system:masters"),
        f"'system:masters' {_RESERVED}",
    ),
    "a common name without a SAN": (
        _with_subject(NameOID.COMMON_NAME, "other.example.com"),
        "'other.example.com' is not among the subject alternative names",
    ),
}
_NOT_ALLOWED: dict[str, tuple[Request, str]] = {
    "a name that no rule allows": (Request(csr_pem(FOREIGN_NAME)), FOREIGN_NAME),
    "the SPIFFE ID of another account": (Request(csr_pem(_FOREIGN_ID)), _FOREIGN_ID),
    "forged labels and annotations": (Request(csr_pem(FOREIGN_NAME), **_FORGED_NOTES), FOREIGN_NAME),
    "a forged requester": (Request(csr_pem(FOREIGN_NAME), spec=_FORGED_REQUESTER), FOREIGN_NAME),
    "too long a lifetime": (Request(csr_pem(NAME), seconds=48 * 3600), "48h is longer than the 24h"),
}
REJECTED_BY_THE_API_SERVER = {"a wrong signature"}


@pytest.mark.timeout(180)
def test_invalid_and_foreign_requests_are_denied_with_a_reason() -> None:
    created: dict[str, str] = {}
    rejected: dict[str, str] = {}
    for case, (request, _) in (_INVALID | _NOT_ALLOWED).items():
        try:
            created[case] = create_as_pod(request)
        except urllib.error.HTTPError as error:
            rejected[case] = error.read().decode()
    # certmount has this check too, for an API server that accepts such a request.
    assert set(rejected) == REJECTED_BY_THE_API_SERVER, rejected
    for case, name in created.items():
        csr = wait_until_processed(name)
        kind, reason, message = condition_of(csr)
        assert (kind, reason) == ("Denied", "InvalidCSR" if case in _INVALID else "NameNotAllowed"), (case, message)
        assert (_INVALID | _NOT_ALLOWED)[case][1] in message, case
        assert "certificate" not in csr["status"], case


def test_requester_that_is_no_running_pod_is_denied() -> None:
    """Users, nodes, tokens without a pod, and pods that are deleted, recreated, on another node or of another account."""
    extra, request = recorded_extra(POD), Request(csr_pem(NAME))
    accounts = "system:serviceaccount"
    unbound = authority.token("default", NAMESPACE)
    cases = {
        create_as(request, "jane@example.com", **extra): "is not a service account",
        create_as(request, f"system:node:{host.NODE}", **extra): "is not a service account",
        create_as(request): "has no pod-name, pod-uid, node-name",
        create_as(request, **{**extra, "pod_name": "deleted"}): "does not exist",
        create_as(request, **{**extra, "pod_uid": "6f1b2c0e-0000-4000-8000-000000000000"}): "was created again",
        create_as(request, **{**extra, "node_name": "node2"}): "its token names node2",
        create_as(request, f"{accounts}:{NAMESPACE}:builder", **extra): "runs as service account default",
        create_as(request, f"{accounts}:kube-system:default", **extra): "does not exist",
        create_with_token(request, unbound): "has no pod-name",
    }
    for name, text in cases.items():
        kind, reason, message = condition_of(wait_until_processed(name))
        assert (kind, reason) == ("Denied", "TokenRejected"), text
        assert text in message


def test_terminating_pod_is_denied() -> None:
    """The API server still accepts the token of a terminating pod, but the authority does not."""
    terminating = Pod(NAMESPACE, "terminating")
    pod = manifest(terminating, {})
    pod["metadata"]["finalizers"] = ["certmount.dev/e2e"]
    cluster.apply(pod)
    terminating.wait_until_ready()
    extra = recorded_extra(terminating)
    terminating.delete("--wait=false")
    csr = wait_until_processed(create_as(Request(csr_pem(NAME)), **extra))
    patch = '{"metadata": {"finalizers": null}}'
    cluster.kubectl("-n", NAMESPACE, "patch", "pod", terminating.name, "--type=merge", "-p", patch)
    kind, reason, message = condition_of(csr)
    assert (kind, reason) == ("Denied", "TokenRejected")
    assert "is terminating" in message


def test_manual_approval_does_not_override_the_policy() -> None:
    with cluster.stopped_authority():
        name = create_as_pod(Request(csr_pem(FOREIGN_NAME)))
        cluster.kubectl("certificate", "approve", name)
    conditions = wait_until_processed(name)["status"]["conditions"]
    assert [condition["type"] for condition in conditions] == ["Approved", "Failed"]
    assert conditions[1]["reason"] == "NameNotAllowed"
    assert "certificate" not in cluster.get("csr", name)["status"]


def test_requests_for_other_signers_are_ignored() -> None:
    """The authority does not process them, although it processes a later one for its signer."""
    other = create_as_pod(Request(csr_pem(NAME), signer="example.com/other"))
    wait_until_processed(create_as_pod(Request(csr_pem(NAME))))
    assert not cluster.get("csr", other)["status"]


def test_another_replica_takes_over_from_a_stopped_leader() -> None:
    """A replica that stops releases its lease, and the other one processes the next request."""
    leader = cluster.get("lease", "certmount-csr-signer")["spec"]["holderIdentity"]
    assert leader in {pod["metadata"]["name"] for pod in host.authorities()}
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "pod", leader, "--wait=false")
    assert "certificate" in wait_until_processed(create_as_pod(Request(csr_pem(NAME))))["status"]
    cluster.wait_for_rollout()
    cluster.wait_until(
        lambda: cluster.get("lease", "certmount-csr-signer")["spec"]["holderIdentity"] not in ("", leader),
        seconds=45,
        what="another replica holds the lease",
    )


def _documented_commands(mark: str) -> str:
    """Return the commands below a mark in docs/kubernetes-csr.md."""
    return DOCS.read_text().split(f"<!-- {mark} -->\n```\n")[1].split("```")[0]


def test_documented_script_gets_a_certificate(tmp_path: Path) -> None:
    """The script works with a pod's token for the name of its Service, which needs no policy rule."""
    pod = Pod("default", "hello")
    cluster.apply(service("hello", "default", port=443), manifest(pod, {}, labels={"app": "hello"}))
    pod.wait_until_ready()
    subprocess.run(["bash", "-euc", _documented_commands("requester")], check=True, timeout=30)
    server = {"server": "https://127.0.0.1:6443", "certificate-authority": str(cluster.ca_file())}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": server}],
        "users": [{"name": "u", "user": {"token": authority.token("default", "default", "hello")}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(json.dumps(config))
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "config")}
    script = ["bash", "-euc", _documented_commands("script")]
    try:
        subprocess.run(script, cwd=tmp_path, env=environment, check=True, timeout=90)
        leaf, *_ = decode_certificates((tmp_path / "site.crt").read_bytes())
        assert names_of(leaf.extensions) == names("hello.default.svc", "spiffe://cluster.local/ns/default/sa/default")
        key = load_key(Secret((tmp_path / "site.key").read_bytes()))
        assert public_bytes(key.public_key()) == public_bytes(leaf.public_key())  # type: ignore[arg-type]  # an EC key
    finally:
        cluster.kubectl("delete", "clusterrolebinding,clusterrole", "certmount-requester")
        cluster.kubectl("delete", "pod,service", "hello", "-n", "default", "--wait=false")
