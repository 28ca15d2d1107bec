"""Writes the requests of the load generator to files in its format (tests/bench/loadgen), before the measurement."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver._proto import authority_pb2
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from tests.support.tokens import DRIVER, Pod, TokenIssuer

LIFETIME = timedelta(hours=1)
PODS = 4000


@dataclass(frozen=True, slots=True)
class PodRequest:
    """A pod and its certificate request. Its node is set when the request is written."""

    pod: Pod
    name: str
    csr: bytes


@dataclass(frozen=True, slots=True)
class Provisioner:
    """A JWK provisioner of step-ca, which signs one-time tokens."""

    name: str
    key: ec.EllipticCurvePrivateKey
    key_id: str
    audience: str


def make_pods() -> list[PodRequest]:
    """Return pods of 400 service accounts in 40 namespaces, with EC-P256 requests."""
    return [_pod(number) for number in range(PODS)]


def _pod(number: int) -> PodRequest:
    account, namespace = f"app-{number % 10}", f"team-{number % 40}"
    pod = Pod(
        f"{account}-{number:05}",
        namespace,
        account,
        uid=f"11111111-1111-4111-8111-{number:012}",
        service_account_uid=f"33333333-3333-4333-8333-{number % 400:012}",
    )
    name = f"{account}.{namespace}.svc.cluster.local"
    return PodRequest(pod, name, build_csr(generate_key(KeyType.EC_P256), Names.of([DNSName.parse(name)])))


def _on_node(pod: Pod, node: int) -> Pod:
    return replace(pod, node=f"node-{node:03}", node_uid=f"22222222-2222-4222-8222-{node:012}")


def driver_on(node: int) -> Pod:
    return _on_node(replace(DRIVER, name=f"certmount-{node:03}", uid=f"44444444-4444-4444-8444-{node:012}"), node)


def write_certmount(file: Path, pods: Iterable[PodRequest], issuer: TokenIssuer, nodes: range) -> None:
    """Write Issue calls with the pod's token and its driver's token as bearer; RS256, like API servers. Nodes alternate."""
    tokens = {node: issuer.node_token(driver_on(node)).reveal() for node in nodes}

    def records() -> Iterator[tuple[str, str, bytes]]:
        for number, each in enumerate(pods):
            node = nodes[number % len(nodes)]
            token = issuer.pod_token(_on_node(each.pod, node)).reveal()
            request = authority_pb2.IssueRequest(csr=each.csr, pod_token=token)
            request.duration.FromTimedelta(LIFETIME)
            yield each.name, tokens[node], request.SerializeToString()

    _write(file, records())


def write_step_ca(file: Path, pods: Iterable[PodRequest], provisioner: Provisioner) -> None:
    """Write sign calls, each with a one-time token that is bound to its request."""
    now = int(time.time())

    def records() -> Iterator[tuple[str, str, bytes]]:
        for number, each in enumerate(pods):
            claims = {
                "iss": provisioner.name,
                "aud": provisioner.audience,
                "sub": each.name,
                "sans": [each.name],
                "jti": f"{file.name}-{number}",
                "iat": now,
                "nbf": now,
                "exp": now + 3600,
                "cnf": {"x5rt#S256": _base64url(hashlib.sha256(each.csr).digest())},
            }
            token = jwt.encode(claims, provisioner.key, algorithm="ES256", headers={"kid": provisioner.key_id})
            pem = x509.load_der_x509_csr(each.csr).public_bytes(Encoding.PEM).decode()
            body = {"csr": pem, "ott": token, "notAfter": f"{LIFETIME.total_seconds():.0f}s"}
            yield each.name, "", json.dumps(body).encode()

    _write(file, records())


def _write(file: Path, records: Iterable[tuple[str, str, bytes]]) -> None:
    with file.open("wb") as out:
        for name, bearer, body in records:
            for field in (name.encode(), bearer.encode(), body):
                out.write(len(field).to_bytes(4, "big") + field)


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
