"""Calls the authority as a node driver does, or as someone does who would like to pass for one."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import grpc
from cryptography import x509

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.names import Names
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from csi_driver.rpc.errors import REASON_KEY
from tests.e2e.kubectl import CERTMOUNT, get, kubectl

NAME = "certmount-authority.certmount.svc"


@dataclass(frozen=True)
class Outcome:
    """What a call came to."""

    reason: str
    """Empty: it succeeded."""
    message: str = ""
    leaf: x509.Certificate | None = None
    roots: tuple[bytes, ...] = ()


def root() -> bytes:
    """The roots (PEM) that pods trust, as they are published."""
    pem: str = get("configmap", "certmount-root")["data"]["root.crt"]
    return pem.encode()


def serving_root(namespace: str = CERTMOUNT) -> bytes:
    """The root (PEM) of the authority's own certificate, as the nodes get it."""
    pem: str = get("configmap", "certmount-root", namespace)["data"]["authority.crt"]
    return pem.encode()


def secret_root(namespace: str = CERTMOUNT) -> bytes:
    """The root (PEM) as the authority keeps it; empty where there is none yet."""
    data = get("secret", "certmount-ca", namespace).get("data") or {}
    return base64.b64decode(data.get("root.crt", ""))


def service_address() -> str:
    return f"{get('service', 'certmount-authority')['spec']['clusterIP']}:443"


def token(account: str, namespace: str, pod: str, audience: str) -> str:
    """A token bound to a pod, as the kubelet has it made."""
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}")
    return kubectl("-n", namespace, "create", "token", account, *bound, f"--audience={audience}").strip()


def issue(pod_token: str, node_token: str | None, *, address: str = "", trusted: bytes = b"") -> Outcome:
    """Asks for a certificate with the SPIFFE ID; ``address`` chooses a replica, ``trusted`` (PEM) another root."""
    credentials = grpc.ssl_channel_credentials(trusted or serving_root())
    options = (("grpc.ssl_target_name_override", NAME),)
    csr = build_csr(generate_key(KeyType.EC_P256), Names())
    request = authority_pb2.IssueRequest(csr=csr, pod_token=pod_token)
    metadata = () if node_token is None else (("authorization", f"Bearer {node_token}"),)
    with grpc.secure_channel(address or service_address(), credentials, options) as channel:
        try:
            response = authority_pb2_grpc.AuthorityStub(channel).Issue(request, timeout=30, metadata=metadata)
        except grpc.RpcError as error:
            reasons = [str(item.value) for item in error.trailing_metadata() or () if item.key == REASON_KEY]
            return Outcome(reasons[0] if reasons else error.code().name, error.details() or "")
    return Outcome(
        "", leaf=x509.load_der_x509_certificate(response.chain[0]), roots=tuple(response.trust[DEFAULT_ISSUER].roots)
    )
