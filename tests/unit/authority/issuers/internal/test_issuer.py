"""The internal CA as an issuer: what it signs and what it rejects."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.certificates import CAKeyPair
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
from tests.unit.authority.csr_signer.fakes import LoadedCA
from tests.unit.core import pki

NOW = pki.NOW
KEY = generate_key(KeyType.EC_P256)


def request(*names: str, usages: tuple[Usage, ...] = (Usage.SERVER, Usage.CLIENT), named: bool = True) -> IssuerRequest:
    identity = cast("PodIdentity", None)  # not used
    granted = pki.names(*names)
    csr = parse_csr(build_csr(KEY, granted if named else Names()))
    return IssuerRequest(csr, Grant(granted, timedelta(hours=1), usages, ("test",)), identity)


def issuer(ca: LoadedCA) -> InternalIssuer:
    return InternalIssuer(cast("CertificateAuthority", ca), lambda: NOW)


async def issue(keyring: Keyring, to_sign: IssuerRequest) -> tuple[list[x509.Certificate], Sequence[bytes]]:
    issued = await issuer(LoadedCA(keyring)).issue(to_sign)
    return [x509.load_der_x509_certificate(one) for one in issued.chain], issued.roots


async def test_certificate_has_its_chain_roots_and_granted_usages() -> None:
    root, stranger = pki.authority("root"), pki.authority("stranger")
    middle = pki.authority("middle", root)
    lower = pki.authority("lower", middle)
    intermediate = CAKeyPair(lower.certificate, lower.key)
    keyring = Keyring((root.certificate, stranger.certificate), None, intermediate, (middle.certificate,))
    (leaf, *chain), roots = await issue(keyring, request("a.test", usages=(Usage.CLIENT,)))
    assert chain == [lower.certificate, middle.certificate]
    assert list(roots) == pki.der(root.certificate, stranger.certificate)
    leaf.verify_directly_issued_by(lower.certificate)
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CLIENT_AUTH]


async def test_all_names_that_the_ca_does_not_permit_are_reported() -> None:
    design = CAProfile(permitted=tuple(map(parse_constraint, ("dns:example.com", "uri:cluster.local"))))
    keyring = make_keyring(NOW, design)
    (leaf, _), _ = await issue(keyring, request("a.example.com", pki.SPIFFE))
    assert names_of(leaf.extensions) == pki.names("a.example.com", pki.SPIFFE)
    with pytest.raises(CertmountError) as failure:
        await issue(keyring, request("a.example.com", "a.test", "spiffe://other/x", pki.SPIFFE))
    assert failure.value.reason is Reason.NAME_NOT_ALLOWED
    assert [str(fault) for fault in failure.value.faults] == [
        f"{name}: the CA's certificate permits only {permitted}; "
        "request names that the CA permits, or ask an administrator to change the CA"
        for name, permitted in (("a.test", "dns:example.com"), ("spiffe://other/x", "uri:cluster.local"))
    ]


async def test_names_that_the_pod_did_not_request_are_omitted_if_the_ca_does_not_permit_them() -> None:
    """Names of Services are optional for a pod that requests no names; its SPIFFE ID is not."""
    keyring = make_keyring(NOW, CAProfile(permitted=(parse_constraint("dns:example.com"),)))
    (leaf, _), _ = await issue(keyring, request("shop.example.com", "shop.web.svc", pki.SPIFFE, named=False))
    assert names_of(leaf.extensions) == pki.names("shop.example.com", pki.SPIFFE)
    strict = make_keyring(NOW, CAProfile(permitted=(parse_constraint("uri:elsewhere"),)))
    with pytest.raises(CertmountError, match="spiffe://"):
        await issue(strict, request("shop.web.svc", pki.SPIFFE, named=False))


async def test_constraints_of_a_new_keyring_apply_immediately() -> None:
    ca = LoadedCA(make_keyring(NOW))
    internal = issuer(ca)
    await internal.issue(request("a.test"))
    ca.current = make_keyring(NOW, CAProfile(permitted=(parse_constraint("dns:example.com"),)))
    with pytest.raises(CertmountError, match=r"a\.test"):
        await internal.issue(request("a.test"))


async def test_constraints_in_the_whole_chain_apply() -> None:
    """If they constrain directory names, the subject is empty."""
    directory = x509.DirectoryName(x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Example")]))
    constraints = x509.NameConstraints([directory], [x509.DNSName("b.test")])
    root = pki.authority("root")
    middle = pki.authority("middle", root, extensions=[pki.CA_USAGE, constraints])
    lower = pki.authority("lower", middle)
    keyring = Keyring((root.certificate,), None, CAKeyPair(lower.certificate, lower.key), (middle.certificate,))
    (leaf, *_), _ = await issue(keyring, request("a.test"))
    assert not leaf.subject.rdns
    with pytest.raises(CertmountError, match=r"x\.b\.test: the CA's certificate excludes dns:b\.test"):
        await issue(keyring, request("x.b.test"))


@pytest.mark.parametrize("left", [timedelta(minutes=20), timedelta()])
@pytest.mark.parametrize("short", ["root", "middle"])
async def test_certificate_does_not_outlive_a_certificate_above_its_signer(short: str, left: timedelta) -> None:
    """An administrator's CA can have an intermediate that outlives its issuer. Nodes renew by the expiry of the leaf."""
    validity = {name: pki.Validity(end=left if name == short else timedelta(days=9)) for name in ("root", "middle")}
    root = pki.authority("root", validity=validity["root"])
    middle = pki.authority("middle", root, validity=validity["middle"])
    lower = pki.authority("lower", middle, validity=pki.Validity(end=timedelta(days=9)))
    keyring = Keyring((root.certificate,), None, CAKeyPair(lower.certificate, lower.key), (middle.certificate,))
    if left:
        (leaf, *_), _ = await issue(keyring, request("a.test"))
        assert leaf.not_valid_after_utc == NOW + left
    else:
        with pytest.raises(CertmountError, match="a certificate of the internal CA has expired"):
            await issue(keyring, request("a.test"))


async def test_expired_intermediate_signs_nothing_and_the_error_is_retryable() -> None:
    keyring = make_keyring(NOW - timedelta(days=400))
    with pytest.raises(CertmountError, match="has expired") as failure:
        await issue(keyring, request("a.test"))
    assert failure.value.retryable
    assert keyring.root.public_bytes(Encoding.DER) == keyring.roots_der[0]
