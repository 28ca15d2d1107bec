"""Certificates for tests of the node that need one, but nothing of what is in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import VerifiedCertificate
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import CertificateSpec, KeyType
from csi_driver.node.issuance.enrolled import Enrolled, Wanted
from csi_driver.node.issuance.pending import Prepared
from csi_driver.node.pods import Pod
from tests.support.scripted_authority import TestCA

POD = Pod("web", "shop-0", "uid", "shop")
SPEC = CertificateSpec(Names.of([DNSName.parse("shop.example.com")]), issuer="acme")
WANTED = Wanted.of(POD, SPEC)
SETS: Mapping[str, RootSet] = {"acme": RootSet((b"root",), 1)}


@functools.cache
def key() -> PrivateKey:
    """The same one each time."""
    return generate_key(KeyType.EC_P256)


@functools.cache
def bundle() -> VerifiedCertificate:
    """A root that is its own chain."""
    ca = TestCA()
    return VerifiedCertificate((ca.certificate,), (ca.certificate,))


def prepared() -> Prepared:
    """What a question is asked with."""
    return Prepared(key(), build_csr(key(), SPEC.names))


def enrolled(issued_at: float = 0.0, renew_at: float = 60.0, not_after: float = 100.0, **changes: bool) -> Enrolled:
    """Times in seconds; each call makes another value."""
    return Enrolled(key(), bundle(), SETS, issued_at, renew_at, not_after, **changes)
