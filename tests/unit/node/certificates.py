"""Certificates for unit tests of the node that do not depend on their contents."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import VerifiedCertificate
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from csi_driver.node.issuance.certificate_request import ObtainedCertificate, RequestKey
from csi_driver.node.issuance.pending_requests import PreparedRequest
from csi_driver.node.pods import Pod
from tests.support.scripted_authority import TestCA

POD = Pod("web", "shop-0", "uid", "shop")
SPEC = CertificateSpec(Names.of([DNSName.parse("shop.example.com")]), issuer="acme")
KEY = RequestKey.of(POD, SPEC)
ROOT_SETS: Mapping[str, RootSet] = {"acme": RootSet((b"root",), 1)}


@functools.cache
def private_key() -> PrivateKey:
    return generate_key(KeyType.EC_P256)


@functools.cache
def verified_certificate() -> VerifiedCertificate:
    """Return a self-signed root as its own chain."""
    ca = TestCA()
    return VerifiedCertificate((ca.certificate,), (ca.certificate,))


def prepared_request() -> PreparedRequest:
    return PreparedRequest(private_key(), build_csr(private_key(), SPEC.names))


def obtained_certificate(
    issued_at: float = 0.0, renew_at: float = 60.0, not_after: float = 100.0, *, interim: bool = False
) -> ObtainedCertificate:
    """Return a new value for each call. Times are in seconds."""
    return ObtainedCertificate(
        private_key(), verified_certificate(), ROOT_SETS, issued_at, renew_at, not_after, interim
    )


def pod_named(name: str, namespace: str | None = None) -> Pod:
    """Return a pod whose UID and service account are its name. By default, it has its own namespace."""
    return Pod(name if namespace is None else namespace, name, name, name)
