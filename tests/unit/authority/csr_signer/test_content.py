"""The content of CertificateSigningRequests and the pods that created them."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.csr_signer.requests import parse_content, parse_requester, verify_running
from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER, ClusterCSR
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.errors import CertmountError, Fault
from csi_driver.core.identity import PodIdentity, ServiceAccount
from tests.support.api_objects import csr_of
from tests.unit.authority.csr_signer.fakes import EXTRA, NAME, USAGES, USERNAME, crafted, item, pem
from tests.unit.core import pki

POD = LivePod("pod-uid", "edge", "node-a", False)


def authenticate(request: ClusterCSR) -> PodIdentity:
    pod = parse_requester(request)
    exists = (pod.service_account.namespace, pod.pod_name) == ("web", "edge-0")
    verify_running(pod, POD if exists else None)
    return pod


def stored(request: dict[str, Any]) -> ClusterCSR:
    metadata = {"name": "csr-1", "uid": "uid-1", **request["metadata"]}
    return csr_of({**request, "metadata": metadata})


def changed_signature() -> bytes:
    der = bytearray(x509.load_pem_x509_csr(pem(NAME)).public_bytes(Encoding.DER))
    der[-1] ^= 1
    return block(base64.encodebytes(bytes(der)))


def block(body: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"


def with_subject(kind: x509.ObjectIdentifier, text: str) -> dict[str, Any]:
    return item(crafted(subject=(kind, text)))


UNSUPPORTED = "is not supported in certificates for pods"


BLOCK = pem(NAME)
ANY_PURPOSE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no PEM": (item(b""), "exactly one PEM block"),
    "two blocks": (item(BLOCK + BLOCK), "exactly one PEM block"),
    "text before": (item(b"x\n" + BLOCK), "exactly one PEM block"),
    "text after": (item(BLOCK + b"x"), "exactly one PEM block"),
    "PEM headers": (item(BLOCK.replace(b"REQUEST-----\n", b"REQUEST-----\nA: b\n\n", 1)), "exactly one PEM block"),
    "another label": (item(BLOCK.replace(b"CERTIFICATE REQUEST", b"CERTIFICATE")), "exactly one PEM block"),
    "no base64": (item(BLOCK[:50] + BLOCK[51:]), "PEM block"),
    "no request": (item(block(b"AAAA\n")), "is not PKCS#10"),
    "signature": (item(changed_signature()), "has an invalid signature"),
    "key": (item(crafted(key=ec.generate_private_key(ec.SECP256K1()))), "has an unsupported key type"),
    "usage": (item(usages=[*USAGES, "cert sign"]), "spec.usages: cert sign is not allowed for pods"),
    "any": (item(usages=["any"]), "spec.usages: any is not allowed for pods"),
    "no purpose": (item(usages=["digital signature"]), "neither server auth nor client auth"),
    "CA": (item(crafted(x509.BasicConstraints(ca=True, path_length=0))), "requests a CA certificate"),
    "CA's usage": (item(crafted(pki.key_usage("key_cert_sign"))), "more than digital signature"),
    "key agreement": (item(crafted(pki.key_usage("key_agreement"))), "more than digital signature"),
    "purpose": (item(crafted(ANY_PURPOSE)), "server auth and client"),
    "extension": (item(crafted(x509.OCSPNoCheck())), UNSUPPORTED),
    "system user": (with_subject(NameOID.COMMON_NAME, "system:admin"), "is reserved for Kubernetes"),
    "system group": (with_subject(NameOID.ORGANIZATION_NAME, "System:masters"), "is reserved for Kubernetes"),
    "organisation": (with_subject(NameOID.ORGANIZATION_NAME, "Example"), UNSUPPORTED),
    "common name": (with_subject(NameOID.COMMON_NAME, "b.web.svc"), "not among the subject alternative names"),
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid_content_is_rejected(what: str) -> None:
    """The message names the field. Content that the certificate cannot have is not omitted silently."""
    request, text = INVALID[what]
    with pytest.raises(CertmountError, match="InvalidCSR: ") as rejected:
        parse_content(stored(request))
    assert text in str(rejected.value)
    assert all(isinstance(fault, Fault) for fault in rejected.value.faults)


@pytest.mark.parametrize(
    "request_pem",
    [
        crafted(subject=(NameOID.COMMON_NAME, NAME.upper())),
        crafted(x509.BasicConstraints(False, None), pki.key_usage("digital_signature", "key_encipherment")),
        crafted(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
        BLOCK.replace(b"\n", b"\r\n"),
        b"\n" + BLOCK + b"\n\n",
    ],
)
def test_common_content_of_scripts_is_accepted(request_pem: bytes) -> None:
    csr, _ = parse_content(stored(item(request_pem)))
    assert csr.names.dns


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "a person": (item(username="jane@example.com"), "is not a service account"),
    "a node": (item(username="system:node:node-a"), "is not a service account"),
    "half an account": (item(username="system:serviceaccount:web"), "is not a service account"),
    "a strange account": (item(username="system:serviceaccount:web:a:b"), "is not a service account"),
    "no pod": (item(extra={}), "has no pod-name, pod-uid, node-name"),
    "no node": (item(extra={**EXTRA, "node-name": []}), "has no node-name"),
    "two pods": (item(extra={**EXTRA, "pod-uid": ["pod-uid", "other"]}), "has no pod-uid"),
    "a deleted pod": (item(extra={**EXTRA, "pod-name": ["edge-1"]}), "pod web/edge-1: does not exist"),
    "a recreated pod": (item(extra={**EXTRA, "pod-uid": ["before"]}), "was created again"),
    "another node": (item(extra={**EXTRA, "node-name": ["node-b"]}), "is on node node-a, but its token names node-b"),
    "another account": (item(username="system:serviceaccount:web:other"), "runs as service account edge, not other"),
    "the same name elsewhere": (item(username="system:serviceaccount:shop:edge"), "pod shop/edge-0: does not exist"),
}


@pytest.mark.parametrize("what", REJECTED)
def test_requester_that_is_not_a_running_pod_is_rejected(what: str) -> None:
    request, text = REJECTED[what]
    with pytest.raises(CertmountError, match="TokenRejected: ") as rejected:
        authenticate(stored(request))
    assert text in str(rejected.value)


def test_terminating_pod_is_rejected() -> None:
    """Its token is still valid for some seconds."""
    with pytest.raises(CertmountError, match="is terminating"):
        verify_running(parse_requester(stored(item())), LivePod("pod-uid", "edge", "node-a", True))


@given(
    st.builds(
        ClusterCSR,
        name=st.just("x"),
        uid=st.just("u"),
        created_at=st.just(0.0),
        signer=st.just(CERTMOUNT_SIGNER),
        request=st.binary(max_size=200) | st.sampled_from([BLOCK, BLOCK[:-3], BLOCK[30:]]),
        usages=st.lists(st.text(max_size=10), max_size=3).map(tuple),
        expiration_s=st.none() | st.integers(),
        username=st.text(max_size=60) | st.text(max_size=20).map(lambda text: f"system:serviceaccount:{text}"),
        extra=st.dictionaries(
            st.sampled_from([f"authentication.kubernetes.io/{key}" for key in EXTRA]), st.lists(st.text()).map(tuple)
        ),
    )
)
def test_any_request_is_parsed_or_rejected(csr: ClusterCSR) -> None:
    for read in (parse_content, parse_requester):
        with contextlib.suppress(CertmountError):
            read(csr)


def test_identity_comes_from_what_the_api_server_recorded() -> None:
    extra = {f"authentication.kubernetes.io/{key}": tuple(value) for key, value in EXTRA.items()}
    csr = ClusterCSR("x", "u", 0.0, CERTMOUNT_SIGNER, b"", (), None, USERNAME, extra)
    account = ServiceAccount("web", "edge")
    assert parse_requester(csr) == PodIdentity(account, "", "edge-0", "pod-uid", "node-a", "node-uid", 0.0)
