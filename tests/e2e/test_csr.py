"""CertificateSigningRequests at a real API server: by pods for our own signer, and by the authority for its volumes."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.issuers.certificate_check import ends_at
from csi_driver.core.certificates.csr import build_csr, names_of
from csi_driver.core.certificates.keys import PrivateKey, generate_key, load_key, public_bytes
from csi_driver.core.formats.pem import decode_certificates, encode_certificates
from csi_driver.core.names import URI, DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from tests.e2e import authority, host
from tests.e2e.kubectl import CERTMOUNT, apply, find, get, kubectl, make_namespace, roll_out, wait_for, wait_until
from tests.e2e.logs import LogKeeper
from tests.e2e.pods import Pod, manifest
from tests.unit.core import pki

NAMESPACE = "e2e-csr"
SIGNER = "certmount.dev/pod"
POD = Pod(NAMESPACE, "script")
SPIFFE = f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"
NAME = f"script.{NAMESPACE}.svc"
PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:default"
USAGES = ("digital signature", "server auth", "client auth")
DOCS = Path(__file__).parents[2] / "docs" / "kubernetes-csr.md"
EXTRA = "authentication.kubernetes.io/"


@dataclass(frozen=True)
class Request:
    """A request as somebody makes it, good unless it is said otherwise."""

    pem: bytes
    usages: Sequence[str] = USAGES
    signer: str = SIGNER
    seconds: int | None = 3600
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        spec = {
            "signerName": self.signer,
            "request": base64.b64encode(self.pem).decode(),
            "usages": list(self.usages),
            **({"expirationSeconds": self.seconds} if self.seconds is not None else {}),
            **self.spec,
        }
        metadata = {"generateName": "e2e-csr-", "labels": self.labels, "annotations": self.annotations}
        kind = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}
        return {**kind, "metadata": metadata, "spec": spec}


def send(request: Request, headers: dict[str, str], *, admin: bool) -> str:
    """Makes the request at the API server; its name."""
    pki = Path(os.environ["LOCALKUBE_RUN"]) / "pki"
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    if admin:
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    body = json.dumps(request.document()).encode()
    headers = {"Content-Type": "application/json", **headers}
    asked = urllib.request.Request(f"https://127.0.0.1:6443{PATH}", body, headers)
    with urllib.request.urlopen(asked, context=context, timeout=10) as answer:
        name: str = json.load(answer)["metadata"]["name"]
    return name


def by_pod(request: Request) -> str:
    """Made with the pod's own token, as its processes have it."""
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={POD.name}")
    token = kubectl("-n", NAMESPACE, "create", "token", "default", *bound).strip()
    return send(request, {"Authorization": f"Bearer {token}"}, admin=False)


def stamped(request: Request, username: str = ACCOUNT, **extra: str) -> str:
    """Made under any name and with any extra: what the API server would stamp on for a pod that can't be had here."""
    headers = {f"Impersonate-Extra-{EXTRA.replace('/', '%2f')}{key.replace('_', '-')}": to for key, to in extra.items()}
    return send(
        request, {"Impersonate-User": username, "Impersonate-Group": "system:authenticated", **headers}, admin=True
    )


def truth() -> dict[str, str]:
    """What the API server stamps on for the pod."""
    pod = POD.get()
    return {"pod_name": POD.name, "pod_uid": pod["metadata"]["uid"], "node_name": pod["spec"]["nodeName"]}


def finished(name: str) -> Any:
    """The object once it is decided: denied, failed or issued."""

    def found() -> Any:
        csr = get("csr", name)
        status = csr.get("status", {})
        kinds = {one["type"] for one in status.get("conditions", ())}
        return csr if kinds & {"Denied", "Failed"} or "certificate" in status else None

    return wait_until(found, seconds=45, what=f"{name} is decided")


def condition(csr: Any) -> tuple[str, str, str]:
    (one,) = csr["status"]["conditions"]
    return one["type"], one["reason"], one["message"]


def names(*texts: str) -> Names:
    return Names.of(
        [DNSName.parse(text) for text in texts if "://" not in text],
        [URI.parse(text) for text in texts if "://" in text],
    )


def pem(key: PrivateKey, *texts: str) -> bytes:
    return x509.load_der_x509_csr(build_csr(key, names(*texts))).public_bytes(Encoding.PEM)


def built(change: Callable[[x509.CertificateSigningRequestBuilder], x509.CertificateSigningRequestBuilder]) -> bytes:
    """A request for the good name, changed."""
    san = x509.SubjectAlternativeName([x509.DNSName(NAME)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(san, critical=False)
    return change(builder).sign(ec.generate_private_key(ec.SECP256R1()), SHA256()).public_bytes(Encoding.PEM)


def subject(oid: x509.ObjectIdentifier, value: str) -> bytes:
    san = x509.SubjectAlternativeName([x509.DNSName(NAME)])
    builder = x509.CertificateSigningRequestBuilder().add_extension(san, critical=False)
    builder = builder.subject_name(x509.Name([x509.NameAttribute(oid, value)]))
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), SHA256()).public_bytes(Encoding.PEM)


def odd_key() -> bytes:
    san = x509.SubjectAlternativeName([x509.DNSName(NAME)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(san, critical=False)
    return builder.sign(ec.generate_private_key(ec.SECP521R1()), SHA256()).public_bytes(Encoding.PEM)


def unsigned() -> bytes:
    """Its signature is that of another content."""
    der = bytearray(x509.load_pem_x509_csr(good()).public_bytes(Encoding.DER))
    der[-1] ^= 1
    body = base64.encodebytes(bytes(der)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n".encode()


def good() -> bytes:
    return pem(generate_key(KeyType.EC_P256), NAME)


def _documented(kind: str) -> Iterator[Any]:
    """What docs/kubernetes-csr.md tells an administrator to apply."""
    for block in DOCS.read_text().split("```yaml\n")[1:]:
        yield from (one for one in yaml.safe_load_all(block.split("```")[0]) if one.get("kind") == kind)


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A pod that may make requests, and the roles of the documents for the authority as a requester."""
    make_namespace(NAMESPACE)
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "e2e-csr"},
        "rules": [
            {
                "apiGroups": ["certificates.k8s.io"],
                "resources": ["certificatesigningrequests"],
                "verbs": ["create", "get", "watch"],
            }
        ],
    }
    group = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "system:serviceaccounts:e2e-csr"}
    everyone = {**group, "name": "system:authenticated"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "e2e-csr"}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "e2e-csr"},
        "roleRef": reference,
        "subjects": [group, everyone],
    }
    apply(role, binding, *_documented("ClusterRole"), *_documented("ClusterRoleBinding"), manifest(POD, {}))
    wait_for("Ready", f"pod/{POD.name}", namespace=NAMESPACE)
    yield
    kubectl("delete", "csr", "--all")
    kubectl("delete", "clusterrolebinding,clusterrole", "e2e-csr")
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def test_a_pods_own_token_gets_a_certificate(logs: LogKeeper) -> None:
    """Approved, signed by the internal CA for the names that policy allows, with the pod's SPIFFE ID; people can read why."""
    key = generate_key(KeyType.EC_P256)
    name = by_pod(Request(pem(key, NAME)))
    csr = finished(name)
    kind, reason, message = condition(csr)
    assert (kind, reason) == ("Approved", "PolicyAllows")
    assert NAME in message
    assert "policy[0]" in message
    chain = decode_certificates(base64.b64decode(csr["status"]["certificate"]))
    leaf, *rest = chain
    assert names_of(leaf.extensions) == names(NAME, SPIFFE)
    assert public_bytes(leaf.public_key()) == public_bytes(key.public_key())  # type: ignore[arg-type]  # an EC key
    assert timedelta(minutes=59) < leaf.not_valid_after_utc - leaf.not_valid_before_utc < timedelta(minutes=62)
    roots = [one.public_bytes(Encoding.DER) for one in decode_certificates(authority.root())]
    leaf.verify_directly_issued_by(rest[0])
    assert ends_at(chain, roots)
    row = kubectl("get", "csr", name, "--no-headers").split()
    assert (row[2], row[3], row[5]) == (SIGNER, ACCOUNT, "Approved,Issued")

    def told() -> Any:
        return [event for event in logs.events("certmount-authority") if event.get("csr") == name]

    (line,) = wait_until(told, seconds=10, what="the audit log tells of it")
    assert (line["decision"], line["pod"], line["serial"]) == ("issued", POD.name, f"{leaf.serial_number:x}")


CODE_SIGNING = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
CA = x509.BasicConstraints(ca=True, path_length=None)
STRANGE = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
DENIED: dict[str, tuple[Callable[[], Request], str, str]] = {
    "another block beside it": (lambda: Request(good() + good()), "InvalidCSR", "not exactly one PEM block"),
    "text beside it": (lambda: Request(b"hello\n" + good()), "InvalidCSR", "not exactly one PEM block"),
    "a signature of something else": (lambda: Request(unsigned()), "InvalidCSR", "is not signed by the key"),
    "an odd key": (lambda: Request(odd_key()), "InvalidCSR", "has a key of another type"),
    "a usage for code": (
        lambda: Request(good(), (*USAGES, "code signing")),
        "InvalidCSR",
        "code signing is not for pods",
    ),
    "a usage of CAs": (lambda: Request(good(), (*USAGES, "cert sign")), "InvalidCSR", "cert sign is not for pods"),
    "no usage for TLS": (
        lambda: Request(good(), ("digital signature",)),
        "InvalidCSR",
        "neither server auth nor client",
    ),
    "a CA flag": (
        lambda: Request(built(lambda one: one.add_extension(CA, critical=True))),
        "InvalidCSR",
        "asks for a certificate authority",
    ),
    "an unknown extension": (
        lambda: Request(built(lambda one: one.add_extension(STRANGE, critical=False))),
        "InvalidCSR",
        "extension 1.3.6.1.4.1.99999.1",
    ),
    "a usage in the request": (
        lambda: Request(built(lambda one: one.add_extension(CODE_SIGNING, critical=False))),
        "InvalidCSR",
        "extension ExtendedKeyUsage",
    ),
    "a user of Kubernetes": (
        lambda: Request(subject(NameOID.COMMON_NAME, "system:kube-controller-manager")),
        "InvalidCSR",
        "a name of Kubernetes' own",
    ),
    "a group of Kubernetes": (
        lambda: Request(subject(NameOID.ORGANIZATION_NAME, "system:masters")),
        "InvalidCSR",
        "a name of Kubernetes' own",
    ),
    "a common name that is no name": (
        lambda: Request(subject(NameOID.COMMON_NAME, "other.example.com")),
        "InvalidCSR",
        "is not among the subject alternative names",
    ),
    "a name that no rule allows": (
        lambda: Request(pem(generate_key(KeyType.EC_P256), "shop.example.com")),
        "NameNotAllowed",
        "shop.example.com",
    ),
    "another account's identity": (
        lambda: Request(pem(generate_key(KeyType.EC_P256), "spiffe://cluster.local/ns/kube-system/sa/admin")),
        "NameNotAllowed",
        "spiffe://cluster.local/ns/kube-system/sa/admin",
    ),
    "too long a life": (lambda: Request(good(), seconds=48 * 3600), "NameNotAllowed", "not 48h"),
    "forged notes": (
        lambda: Request(
            pem(generate_key(KeyType.EC_P256), "shop.example.com"),
            labels={"certmount.dev/issuer": "own", "certmount.dev/order": "0"},
            annotations={
                "certmount.dev/pod": "certmount/certmount-authority",
                "certmount.dev/names": "shop.example.com",
            },
        ),
        "NameNotAllowed",
        "shop.example.com",
    ),
    "a forged requester": (
        lambda: Request(
            pem(generate_key(KeyType.EC_P256), "shop.example.com"),
            spec={"username": "system:serviceaccount:certmount:certmount-authority", "groups": ["system:masters"]},
        ),
        "NameNotAllowed",
        "shop.example.com",
    ),
}


AT_THE_DOOR = {"a signature of something else"}


@pytest.mark.timeout(180)
def test_whatever_is_wrong_with_a_pods_request_is_denied_with_its_reason() -> None:
    """Each check violated once; the reason can be read where people look."""
    made: dict[str, str] = {}
    turned_away: dict[str, str] = {}
    for what, (make, _, _) in DENIED.items():
        try:
            made[what] = by_pod(make())
        except urllib.error.HTTPError as refusal:
            turned_away[what] = refusal.read().decode()
    # What the API server itself won't keep; the checks are there for one that does.
    assert set(turned_away) == AT_THE_DOOR, turned_away
    for what, name in made.items():
        _, reason, text = DENIED[what]
        csr = finished(name)
        kind, told, message = condition(csr)
        assert (kind, told) == ("Denied", reason), what
        assert text in message, what
        assert "certificate" not in csr["status"], what


def test_whoever_is_no_live_pod_is_denied() -> None:
    """People, nodes, tokens without a pod, pods that are gone, made anew, elsewhere or another account's."""
    true = truth()
    cases = {
        stamped(Request(good()), "jane@example.com", **true): "is no service account",
        stamped(Request(good()), f"system:node:{host.NODE}", **true): "is no service account",
        stamped(Request(good())): "came without pod-name, pod-uid, node-name",
        stamped(Request(good()), **{**true, "pod_name": "gone"}): "is gone",
        stamped(Request(good()), **{**true, "pod_uid": "6f1b2c0e-0000-4000-8000-000000000000"}): "was made anew",
        stamped(Request(good()), **{**true, "node_name": "node2"}): "its token names node2",
        stamped(
            Request(good()), f"system:serviceaccount:{NAMESPACE}:builder", **true
        ): "runs as service account default",
        stamped(Request(good()), "system:serviceaccount:kube-system:default", **true): "is gone",
    }
    unbound = kubectl("-n", NAMESPACE, "create", "token", "default").strip()
    cases[send(Request(good()), {"Authorization": f"Bearer {unbound}"}, admin=False)] = "came without pod-name"
    for name, text in cases.items():
        kind, reason, message = condition(finished(name))
        assert (kind, reason) == ("Denied", "TokenRejected"), text
        assert text in message


def test_a_pod_in_its_end_gets_nothing() -> None:
    """Its token still counts at the API server for a moment."""
    ending = Pod(NAMESPACE, "ending")
    found = dict(manifest(ending, {}))
    found["metadata"] = {**found["metadata"], "finalizers": ["certmount.dev/e2e"]}
    apply(found)
    wait_for("Ready", f"pod/{ending.name}", namespace=NAMESPACE)
    pod = ending.get()
    ending.delete("--wait=false")
    name = stamped(
        Request(good()), pod_name=ending.name, pod_uid=pod["metadata"]["uid"], node_name=pod["spec"]["nodeName"]
    )
    kind, reason, message = condition(finished(name))
    kubectl("-n", NAMESPACE, "patch", "pod", ending.name, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    assert (kind, reason) == ("Denied", "TokenRejected")
    assert "is ending" in message


def test_an_approval_by_hand_makes_no_name_allowed() -> None:
    """Then the request fails, in words."""
    kubectl("-n", CERTMOUNT, "scale", "deployment/certmount-authority", "--replicas=0")
    wait_until(
        lambda: not find("pods", "-l", "app.kubernetes.io/name=certmount-authority"), seconds=60, what="no replica"
    )
    name = by_pod(Request(pem(generate_key(KeyType.EC_P256), "shop.example.com")))
    kubectl("certificate", "approve", name)
    kubectl("-n", CERTMOUNT, "scale", "deployment/certmount-authority", "--replicas=2")
    roll_out("deployment/certmount-authority")
    conditions = finished(name)["status"]["conditions"]
    assert [one["type"] for one in conditions] == ["Approved", "Failed"]
    assert conditions[1]["reason"] == "NameNotAllowed"
    assert "certificate" not in get("csr", name)["status"]


def test_requests_for_other_signers_are_left_alone() -> None:
    """Neither decided nor signed, though a later one of our own is."""
    other = by_pod(Request(good(), signer="example.com/other"))
    finished(by_pod(Request(good())))
    assert not get("csr", other)["status"]


def test_the_next_replica_goes_on_at_once() -> None:
    """Whoever stops hands over what it holds."""
    holder = get("lease", "certmount-csr-signer")["spec"]["holderIdentity"]
    assert holder in {
        pod["metadata"]["name"] for pod in find("pods", "-l", "app.kubernetes.io/name=certmount-authority")
    }
    kubectl("-n", CERTMOUNT, "delete", "pod", holder, "--wait=false")
    csr = finished(by_pod(Request(good())))
    assert "certificate" in csr["status"]
    roll_out("deployment/certmount-authority")
    wait_until(
        lambda: get("lease", "certmount-csr-signer")["spec"]["holderIdentity"] not in ("", holder),
        seconds=45,
        what="another replica holds the lease",
    )


def _shown(mark: str) -> str:
    """The commands of docs/kubernetes-csr.md that stand below a mark."""
    return DOCS.read_text().split(f"<!-- {mark} -->\n```\n")[1].split("```")[0]


def test_the_script_of_the_documents(tmp_path: Path) -> None:
    """As a reader runs it in the pod: with the pod's own token, for the name of its Service, which needs no rule."""
    hello = Pod("default", "hello")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "hello", "namespace": "default"},
        "spec": {"selector": {"app": "hello"}, "ports": [{"port": 443}]},
    }
    apply(service, manifest(hello, {}, labels={"app": "hello"}))
    wait_for("Ready", "pod/hello", namespace="default")
    subprocess.run(["bash", "-euc", _shown("requester")], check=True, timeout=30)
    token = kubectl("create", "token", "default", "--bound-object-kind=Pod", "--bound-object-name=hello").strip()
    cluster_ca = Path(os.environ["LOCALKUBE_RUN"]) / "pki" / "ca.crt"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "c", "cluster": {"server": "https://127.0.0.1:6443", "certificate-authority": str(cluster_ca)}}
        ],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(json.dumps(config))
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "config")}
    try:
        subprocess.run(["bash", "-euc", _shown("script")], cwd=tmp_path, env=environment, check=True, timeout=90)
        leaf, *_ = decode_certificates((tmp_path / "site.crt").read_bytes())
        assert names_of(leaf.extensions) == names("hello.default.svc", "spiffe://cluster.local/ns/default/sa/default")
        key = load_key(Secret((tmp_path / "site.key").read_bytes()))
        assert public_bytes(key.public_key()) == public_bytes(leaf.public_key())  # type: ignore[arg-type]  # an EC key
    finally:
        kubectl("delete", "clusterrolebinding,clusterrole", "certmount-requester")
        kubectl("delete", "pod,service", "hello", "-n", "default", "--wait=false")


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
VALIDITY = pki.Validity(timedelta(days=-3650), timedelta(days=3650))


@pytest.fixture(scope="module")
def corporate() -> Iterator[CorporateSigner]:
    """Its root in a Secret that the authority may read."""
    signer = CorporateSigner()
    root = signer.root.certificate.public_bytes(Encoding.PEM).decode()
    rules = ("--resource=secrets", "--resource-name=corporate-roots", "--verb=get")
    account = ("--serviceaccount=certmount:certmount-authority",)
    kubectl("-n", CERTMOUNT, "create", "secret", "generic", "corporate-roots", f"--from-literal=ca.crt={root}")
    kubectl("-n", CERTMOUNT, "create", "role", "corporate-roots", *rules)
    kubectl("-n", CERTMOUNT, "create", "rolebinding", "corporate-roots", "--role=corporate-roots", *account)
    yield signer
    kubectl("-n", CERTMOUNT, "delete", "secret,role,rolebinding", "corporate-roots")


@pytest.fixture(scope="module")
def issuers(corporate: CorporateSigner) -> Iterator[None]:  # noqa: ARG001  # its roots must be there
    """Volumes may have the cluster's signers as issuers."""
    before = {name: get("configmap", name)["data"] for name in ("certmount-issuers", "certmount-policy")}
    policy = yaml.safe_load(before["certmount-policy"]["policy.yaml"])
    rule = {
        "match": {"namespaces": [NAMESPACE], "serviceAccounts": ["*"]},
        "allow": {
            "dns": ["*.{namespace}.svc"],
            "issuers": ["internal", "own", "approved", "corporate", "by-hand"],
            "max_duration": "4h",
        },
    }
    policy["policy"].append(rule)
    changed = {"certmount-issuers": {"issuers.yaml": ISSUERS}, "certmount-policy": {"policy.yaml": json.dumps(policy)}}
    for name, data in changed.items():
        kubectl("-n", CERTMOUNT, "patch", "configmap", name, "--type=merge", "-p", json.dumps({"data": data}))
    # Sooner than their volumes are looked at again.
    kubectl("-n", CERTMOUNT, "rollout", "restart", "deployment/certmount-authority")
    roll_out("deployment/certmount-authority")
    yield
    for name, data in before.items():
        kubectl("-n", CERTMOUNT, "patch", "configmap", name, "--type=merge", "-p", json.dumps({"data": data}))


def left() -> list[str]:
    """Requests of issuers that are still there."""
    return [csr["metadata"]["name"] for csr in find("csr", "-l", "app.kubernetes.io/managed-by=certmount")]


@pytest.mark.usefixtures("issuers")
def test_the_issuers_are_in_order() -> None:
    """The role of the documents gives all that the check asks for."""
    said = kubectl("-n", CERTMOUNT, "exec", "deploy/certmount-authority", "--", "certmount", "issuer", "check")
    assert "FAIL" not in said, said
    assert "the authority may approve requests for certmount.dev/pod" in said


@pytest.mark.usefixtures("issuers")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("issuer,more", [("own", ""), ("approved", SPIFFE)])
def test_a_volume_over_our_own_signer(issuer: str, more: str) -> None:
    """The authority asks as itself, and its signer believes that by the name that the API server has stamped on."""
    pod = Pod(NAMESPACE, f"volume-{issuer}")
    attributes = {"name": NAME, "issuer": issuer, "duration": "1h", **({"uri-sans": more} if more else {})}
    apply(manifest(pod, attributes))
    wait_for("Ready", f"pod/{pod.name}", namespace=NAMESPACE, seconds=120)
    assert names_of(pod.certificate().extensions) == names(NAME, *([more] if more else []))
    assert pod.read("root.crt").encode() == authority.root()
    assert wait_until(lambda: not left(), seconds=10, what="no request is left")


class CorporateSigner:
    """A signer that certmount knows nothing of: it signs what is approved, and shows its work to nobody."""

    def __init__(self) -> None:
        self.root = pki.authority("corporate", validity=VALIDITY)
        self.signed: list[str] = []

    def work(self) -> None:
        """Signs what there is."""
        for csr in find("csr", "--field-selector", "spec.signerName=example.com/pods"):
            status = csr["status"]
            approved = any(one["type"] == "Approved" for one in status.get("conditions", ()))
            if not approved or "certificate" in status:
                continue
            request = x509.load_pem_x509_csr(base64.b64decode(csr["spec"]["request"]))
            leaf = self._leaf(request, csr["spec"]["expirationSeconds"])
            pem = encode_certificates([leaf, self.root.certificate])
            csr["status"] = {**status, "certificate": base64.b64encode(pem).decode()}
            name = csr["metadata"]["name"]
            kubectl("replace", "--raw", f"{PATH}/{name}/status", "-f", "-", text=json.dumps(csr))
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


@pytest.mark.usefixtures("issuers")
@pytest.mark.timeout(240)
def test_any_signer_of_the_cluster(corporate: CorporateSigner) -> None:
    """With the role of the documents: approved by the authority, or by a person after the pod's call has ended, with one request."""
    quick, slow = Pod(NAMESPACE, "corporate"), Pod(NAMESPACE, "by-hand")
    apply(manifest(quick, {"name": NAME, "issuer": "corporate", "duration": "1h"}))
    apply(manifest(slow, {"name": NAME, "issuer": "by-hand", "duration": "1h"}))

    def signed(pod: Pod) -> Any:
        corporate.work()
        return any(one["type"] == "Ready" and one["status"] == "True" for one in pod.get()["status"]["conditions"])

    wait_until(lambda: signed(quick), seconds=60, what="the corporate signer's certificate")
    assert quick.read("root.crt").encode() == encode_certificates([corporate.root.certificate])
    assert names_of(quick.certificate().extensions) == names(NAME)

    def pending() -> Any:
        selector = f"involvedObject.name={slow.name},reason=IssuancePending"
        return find("events", "--field-selector", selector, namespace=NAMESPACE)

    (event, *_) = wait_until(pending, seconds=60, what="the event IssuancePending")
    (name,) = left()
    assert f"kubectl certificate approve {name}" in event["message"]
    kubectl("certificate", "approve", name)
    wait_until(lambda: signed(slow), seconds=120, what="the certificate that was approved by hand")
    assert corporate.signed[-1] == name
    assert not left()


@pytest.mark.usefixtures("issuers")
@pytest.mark.timeout(300)
def test_nothing_is_left_of_two_hundred(logs: LogKeeper) -> None:
    """Each request is removed as soon as its certificate is read."""
    pods = [Pod(NAMESPACE, f"many-{number}") for number in range(4)]
    apply(*(manifest(pod, {}) for pod in pods))
    wait_for("Ready", *(f"pod/{pod.name}" for pod in pods), namespace=NAMESPACE)
    node_token = authority.token("certmount-node", CERTMOUNT, host.driver()["metadata"]["name"], "certmount-node")
    tokens = [authority.token("default", NAMESPACE, pod.name, "certmount") for pod in pods]
    credentials = grpc.ssl_channel_credentials(authority.serving_root())
    options = (("grpc.ssl_target_name_override", authority.NAME),)
    metadata = (("authorization", f"Bearer {node_token}"),)
    with grpc.secure_channel(authority.service_address(), credentials, options) as channel:
        stub = authority_pb2_grpc.AuthorityStub(channel)

        def issue(number: int) -> bytes:
            request = authority_pb2.IssueRequest(
                csr=build_csr(generate_key(KeyType.EC_P256), names(NAME)),
                pod_token=tokens[number % len(tokens)],
                issuer="own",
            )
            request.duration.FromSeconds(3600)
            chain: Sequence[bytes] = stub.Issue(request, timeout=60, metadata=metadata).chain
            return chain[0]

        with ThreadPoolExecutor(10) as threads:
            leaves = list(threads.map(issue, range(200)))
    assert len({x509.load_der_x509_certificate(leaf).serial_number for leaf in leaves}) == 200
    assert wait_until(lambda: not left(), seconds=10, what="no request is left")
    told = {
        event["csr"]
        for event in logs.events("certmount-authority")
        if event.get("rules") == ["the authority's own decision before"]
    }
    assert len(told) >= 200
