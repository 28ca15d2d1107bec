"""Calls the authority as a node driver does, or as an attacker would."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.names import Names
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from csi_driver.rpc.errors import REASON_KEY
from tests.e2e import cluster, host

NAME = "certmount-authority.certmount.svc"


@dataclass(frozen=True)
class IssueResult:
    """The result of a call: a reason and a message if it failed."""

    reason: str  # empty if the call succeeded
    message: str = ""
    leaf: x509.Certificate | None = None
    roots: tuple[bytes, ...] = ()


def root() -> bytes:
    """Return the published roots (PEM) that pods trust."""
    return str(cluster.get("configmap", "certmount-root")["data"]["root.crt"]).encode()


def serving_root(namespace: str = cluster.CERTMOUNT) -> bytes:
    """Return the published root (PEM) of the authority's TLS certificate."""
    return str(cluster.get("configmap", "certmount-root", namespace)["data"]["authority.crt"]).encode()


def secret_root(namespace: str = cluster.CERTMOUNT) -> bytes:
    """Return the root (PEM) in the authority's Secret; empty if there is none yet."""
    data = cluster.get("secret", "certmount-ca", namespace).get("data") or {}
    return base64.b64decode(data.get("root.crt", ""))


def service_address() -> str:
    return f"{cluster.get('service', 'certmount-authority')['spec']['clusterIP']}:443"


def token(account: str, namespace: str, pod: str = "", audience: str = "") -> str:
    """Return a token of a service account, bound to a pod if one is given."""
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}") if pod else ()
    flags = (*bound, f"--audience={audience}") if audience else bound
    return cluster.kubectl("-n", namespace, "create", "token", account, *flags).strip()


def pod_token(namespace: str, pod: str) -> str:
    """Return the token that the kubelet passes to the driver for a pod of the account ``default``."""
    return token("default", namespace, pod, "certmount")


def node_token() -> str:
    return token("certmount-node", cluster.CERTMOUNT, host.driver()["metadata"]["name"], "certmount-node")


@contextmanager
def connected(address: str = "", trusted: bytes = b"") -> Iterator[Any]:
    """Yield a stub of the authority; ``address`` selects a replica, ``trusted`` (PEM) another root."""
    credentials = grpc.ssl_channel_credentials(trusted or serving_root())
    options = (("grpc.ssl_target_name_override", NAME),)
    with grpc.secure_channel(address or service_address(), credentials, options) as channel:
        yield authority_pb2_grpc.AuthorityStub(channel)


def issue(pod_token: str, node_token: str | None, *, address: str = "", trusted: bytes = b"") -> IssueResult:
    """Request a certificate with the SPIFFE ID."""
    csr = build_csr(generate_key(KeyType.EC_P256), Names())
    request = authority_pb2.IssueRequest(csr=csr, pod_token=pod_token)
    metadata = () if node_token is None else (("authorization", f"Bearer {node_token}"),)
    with connected(address, trusted) as stub:
        try:
            response = stub.Issue(request, timeout=30, metadata=metadata)
        except grpc.RpcError as error:
            reasons = [str(item.value) for item in error.trailing_metadata() or () if item.key == REASON_KEY]
            return IssueResult(reasons[0] if reasons else error.code().name, error.details() or "")
    leaf = x509.load_der_x509_certificate(response.chain[0])
    return IssueResult("", leaf=leaf, roots=tuple(response.trust[DEFAULT_ISSUER].roots))
