"""CertificateSigningRequests: creates them at the API server, as a pod or with any recorded requester."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.names import URI, DNSName, Names
from csi_driver.core.spec import KeyType
from tests.e2e import authority, cluster
from tests.e2e.pods import Pod

NAMESPACE = "e2e-csr"
SIGNER = "certmount.dev/pod"
POD = Pod(NAMESPACE, "requester")
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:default"
SPIFFE_ID = f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"
NAME = f"requester.{NAMESPACE}.svc"
PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
USAGES = ("digital signature", "server auth", "client auth")
DOCS = Path(__file__).parents[2] / "docs" / "kubernetes-csr.md"
_EXTRA = "Impersonate-Extra-authentication.kubernetes.io%2f"


@dataclass(frozen=True)
class Request:
    """A request that is valid by default."""

    pem: bytes
    usages: Sequence[str] = USAGES
    signer: str = SIGNER
    seconds: int | None = 3600
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)

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


def _create(request: Request, headers: Mapping[str, str], *, as_admin: bool) -> str:
    """Create the request at the API server, and return its name. Raises HTTPError."""
    context = ssl.create_default_context(cafile=str(cluster.ca_file()))
    if as_admin:
        context.load_cert_chain(cluster.ca_file().with_name("admin.crt"), cluster.ca_file().with_name("admin.key"))
    body = json.dumps(request.document()).encode()
    headers = {"Content-Type": "application/json", **headers}
    call = urllib.request.Request(f"https://127.0.0.1:6443{PATH}", body, headers)
    with urllib.request.urlopen(call, context=context, timeout=10) as response:
        return str(json.load(response)["metadata"]["name"])


def create_with_token(request: Request, token: str) -> str:
    return _create(request, {"Authorization": f"Bearer {token}"}, as_admin=False)


def create_as_pod(request: Request) -> str:
    return create_with_token(request, authority.token("default", NAMESPACE, POD.name))


def create_as(request: Request, username: str = ACCOUNT, **extra: str) -> str:
    """Create the request with any username and any extra fields that the API server would record for a token."""
    headers = {f"{_EXTRA}{key.replace('_', '-')}": value for key, value in extra.items()}
    headers |= {"Impersonate-User": username, "Impersonate-Group": "system:authenticated"}
    return _create(request, headers, as_admin=True)


def recorded_extra(pod: Pod) -> dict[str, str]:
    """Return what the API server records about a token of the pod."""
    found = pod.get()
    return {"pod_name": pod.name, "pod_uid": found["metadata"]["uid"], "node_name": found["spec"]["nodeName"]}


def wait_until_processed(name: str) -> Any:
    """Return the object once it is denied, failed or issued."""

    def processed() -> Any:
        csr = cluster.get("csr", name)
        status = csr.get("status", {})
        types = {condition["type"] for condition in status.get("conditions", ())}
        return csr if types & {"Denied", "Failed"} or "certificate" in status else None

    return cluster.wait_until(processed, seconds=45, what=f"{name} is processed")


def condition_of(csr: Any) -> tuple[str, str, str]:
    (condition,) = csr["status"]["conditions"]
    return condition["type"], condition["reason"], condition["message"]


def names(*texts: str) -> Names:
    return Names.of(
        [DNSName.parse(text) for text in texts if "://" not in text],
        [URI.parse(text) for text in texts if "://" in text],
    )


def csr_pem(*texts: str, key: PrivateKey | None = None) -> bytes:
    der = build_csr(key or generate_key(KeyType.EC_P256), names(*texts))
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM)


def changed_csr(
    change: Callable[[x509.CertificateSigningRequestBuilder], x509.CertificateSigningRequestBuilder] = lambda csr: csr,
    subject: Sequence[x509.NameAttribute[str]] = (),
    curve: ec.EllipticCurve | None = None,
) -> bytes:
    """Return a CSR (PEM) for the valid name with a change, a subject or another curve."""
    san = x509.SubjectAlternativeName([x509.DNSName(NAME)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    key = ec.generate_private_key(curve or ec.SECP256R1())
    return change(builder.add_extension(san, critical=False)).sign(key, SHA256()).public_bytes(Encoding.PEM)


def documented(kind: str) -> Iterator[Any]:
    """Return the manifests of a kind in docs/kubernetes-csr.md."""
    for block in DOCS.read_text().split("```yaml\n")[1:]:
        yield from (each for each in yaml.safe_load_all(block.split("```")[0]) if each.get("kind") == kind)
