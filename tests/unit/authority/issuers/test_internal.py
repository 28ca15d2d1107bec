"""The internal CA as an issuer: what it signs, and what it won't sign as nobody would believe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.key_pairs import CAKeyPair
from csi_driver.authority.ca.keyring import CAProfile, Keyring, make_keyring
from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.internal.issuer import InternalIssuer
from csi_driver.core.certificates.csr import build_csr, names_of, parse_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import Grant
from csi_driver.core.spec import KeyType, Usage
from tests.unit.core import pki

NOW = pki.NOW
KEY = generate_key(KeyType.EC_P256)


@dataclass
class HeldCA:
    """What an issuer asks a CA for."""

    current: Keyring
    admitted: tuple[timedelta, ...] = ()

    async def record_lifetime(self, life: timedelta) -> Keyring:
        self.admitted += (life,)
        return self.current


def order(*names: str, usages: tuple[Usage, ...] = (Usage.SERVER, Usage.CLIENT), asked: bool = True) -> IssuerRequest:
    identity = cast("PodIdentity", None)  # nothing here looks at it
    granted = pki.names(*names)
    request = parse_csr(build_csr(KEY, granted if asked else Names()))
    return IssuerRequest(request, Grant(granted, timedelta(hours=1), usages, ("test",)), identity)


def issuer(ca: HeldCA) -> InternalIssuer:
    return InternalIssuer(cast("CertificateAuthority", ca), lambda: NOW)


async def issue(keyring: Keyring, wanted: IssuerRequest) -> tuple[list[x509.Certificate], Sequence[bytes]]:
    issued = await issuer(HeldCA(keyring)).issue(wanted)
    return [x509.load_der_x509_certificate(one) for one in issued.chain], issued.roots


async def test_a_leaf_comes_with_its_chain_and_roots() -> None:
    """However long the one and however many the others, for the usages that were granted."""
    root, stranger = pki.authority("root"), pki.authority("stranger")
    middle = pki.authority("middle", root)
    lower = pki.authority("lower", middle)
    keyring = Keyring(
        (root.certificate, stranger.certificate), None, CAKeyPair(lower.certificate, lower.key), (middle.certificate,)
    )
    (leaf, *chain), roots = await issue(keyring, order("a.test", usages=(Usage.CLIENT,)))
    assert chain == [lower.certificate, middle.certificate]
    assert list(roots) == pki.der(root.certificate, stranger.certificate)
    leaf.verify_directly_issued_by(lower.certificate)
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CLIENT_AUTH]


async def test_names_that_the_ca_does_not_permit_are_refused() -> None:
    """All of them, in words for the pod's owner and for the administrator."""
    design = CAProfile(permitted=tuple(map(parse_constraint, ("dns:example.com", "uri:cluster.local"))))
    keyring = make_keyring(NOW, design)
    (leaf, _), _ = await issue(keyring, order("a.example.com", pki.SPIFFE))
    assert names_of(leaf.extensions) == pki.names("a.example.com", pki.SPIFFE)
    with pytest.raises(CertmountError) as refusal:
        await issue(keyring, order("a.example.com", "a.test", "spiffe://other/x", pki.SPIFFE))
    assert refusal.value.reason is Reason.NAME_NOT_ALLOWED
    assert [str(fault) for fault in refusal.value.faults] == [
        f"{name}: the CA's certificate permits {permitted} only; "
        "ask for names within them, or have an administrator change the CA"
        for name, permitted in (("a.test", "dns:example.com"), ("spiffe://other/x", "uri:cluster.local"))
    ]


async def test_names_that_nobody_asked_for_are_left_out_where_the_ca_does_not_permit_them() -> None:
    """A pod that names nothing gets what its CA may sign of its Services' names; its SPIFFE ID is never left out."""
    keyring = make_keyring(NOW, CAProfile(permitted=(parse_constraint("dns:example.com"),)))
    (leaf, _), _ = await issue(keyring, order("shop.example.com", "shop.web.svc", pki.SPIFFE, asked=False))
    assert names_of(leaf.extensions) == pki.names("shop.example.com", pki.SPIFFE)
    strict = make_keyring(NOW, CAProfile(permitted=(parse_constraint("uri:elsewhere"),)))
    with pytest.raises(CertmountError, match="spiffe://"):
        await issue(strict, order("shop.web.svc", pki.SPIFFE, asked=False))


async def test_a_new_keyring_brings_its_own_constraints() -> None:
    """From the first certificate on."""
    ca = HeldCA(make_keyring(NOW))
    internal = issuer(ca)
    await internal.issue(order("a.test"))
    ca.current = make_keyring(NOW, CAProfile(permitted=(parse_constraint("dns:example.com"),)))
    with pytest.raises(CertmountError, match=r"a\.test"):
        await internal.issue(order("a.test"))


async def test_constraints_of_a_ca_that_was_brought_count_too() -> None:
    """Those anywhere in its chain; with directory names among them the subject stays empty."""
    directory = x509.DirectoryName(x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Example")]))
    constraints = x509.NameConstraints([directory], [x509.DNSName("b.test")])
    root = pki.authority("root")
    middle = pki.authority("middle", root, extensions=[pki.CA_USAGE, constraints])
    lower = pki.authority("lower", middle)
    keyring = Keyring((root.certificate,), None, CAKeyPair(lower.certificate, lower.key), (middle.certificate,))
    (leaf, *_), _ = await issue(keyring, order("a.test"))
    assert not leaf.subject.rdns
    with pytest.raises(CertmountError, match=r"x\.b\.test: the CA's certificate excludes dns:b\.test"):
        await issue(keyring, order("x.b.test"))


async def test_an_intermediate_that_has_ended_signs_nothing() -> None:
    """It may be renewed any moment, so the node tries again."""
    keyring = make_keyring(NOW - timedelta(days=400))
    with pytest.raises(CertmountError, match="has expired") as refusal:
        await issue(keyring, order("a.test"))
    assert refusal.value.retryable
    assert keyring.root.public_bytes(Encoding.DER) == keyring.roots_der[0]
