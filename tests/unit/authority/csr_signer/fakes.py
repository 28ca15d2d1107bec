"""CertificateSigningRequests of a pod, valid and invalid, and a cluster in memory."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.keyring import Keyring
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER
from csi_driver.core.cluster.objects import Lease, LivePod
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.spec import KeyType
from tests.unit.core import pki

USERNAME = "system:serviceaccount:web:edge"
NAME = "hello.web.svc"
EXTRA = {"pod-name": ["edge-0"], "pod-uid": ["pod-uid"], "node-name": ["node-a"], "node-uid": ["node-uid"]}
USAGES = ["digital signature", "server auth", "client auth"]
KEY = pki.key_of(KeyType.EC_P256, 9)


def pem(*names: str, key: Any = KEY) -> bytes:
    return x509.load_der_x509_csr(build_csr(key, pki.names(*names))).public_bytes(Encoding.PEM)


def item(
    request: bytes | None = None,
    *,
    username: str = USERNAME,
    extra: Mapping[str, list[str]] | None = None,
    signer: str = CERTMOUNT_SIGNER,
    usages: list[str] | None = None,
    seconds: int | None = 3600,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    recorded = EXTRA if extra is None else extra
    spec = {
        "signerName": signer, "request": base64.b64encode(pem(NAME) if request is None else request).decode(),
        "expirationSeconds": seconds, "username": username, "usages": USAGES if usages is None else usages,
        "extra": {f"authentication.kubernetes.io/{key}": value for key, value in recorded.items()},
    }  # fmt: skip
    return {"metadata": {"labels": dict(labels or {})}, "spec": spec}


def crafted(
    *extensions: x509.ExtensionType, subject: tuple[x509.ObjectIdentifier, str] | None = None, key: Any = KEY
) -> bytes:
    name = x509.Name([x509.NameAttribute(*subject)] if subject else [])
    san = x509.SubjectAlternativeName([x509.DNSName(NAME)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(san, critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


@dataclass
class LoadedCA:
    """The part of a CA that the internal issuer uses."""

    current: Keyring
    unavailable: bool = False

    async def record_lifetime(self, _: timedelta) -> Keyring:
        if self.unavailable:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the internal CA is not loaded yet")
        return self.current


@dataclass
class FakePods:
    """Pods by namespace and name."""

    pods: dict[tuple[str, str], LivePod] = field(default_factory=dict)

    async def find(self, namespace: str, name: str) -> LivePod | None:
        return self.pods.get((namespace, name))


@dataclass
class FakeLease:
    """A lease in memory."""

    lease: Lease = Lease("", 0, "1")
    unavailable: bool = False

    async def load(self) -> Lease:
        if self.unavailable:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the API server cannot be reached")
        return self.lease

    async def save(self, lease: Lease) -> bool:
        found = await self.load()
        if lease.version != found.version:
            return False
        self.lease = Lease(lease.holder, lease.seconds, str(int(found.version) + 1))
        return True
