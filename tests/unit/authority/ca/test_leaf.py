"""The contents of leaf certificates."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import Buffer
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.ca.certificates import BACKDATE, INTERMEDIATE_LIFETIME, CAKeyPair, Leaf, make_root, sign_leaf
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import PublicKey, generate_key, public_bytes
from csi_driver.core.errors import CertmountError
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.spec import KeyType, Usage
from tests.unit.authority.clock import Clock
from tests.unit.core import pki, strategies

NOW = Clock().utc()
KEYRING = make_keyring(NOW)
ID = spiffe_id("cluster.local", "default", "hello")
ID_ONLY = Names.of(uris=[ID])
KEYS: dict[KeyType, PublicKey] = {
    key_type: generate_key(key_type).public_key() for key_type in KeyType if key_type is not KeyType.RSA_4096
}
LONG = DNSName.parse(".".join(["a" * 30] * 3))


def leaf(
    names: Names = ID_ONLY,
    key: PublicKey = KEYS[KeyType.EC_P256],
    lifetime: timedelta = timedelta(hours=1),
    usages: tuple[Usage, ...] = (Usage.SERVER, Usage.CLIENT),
    signer: CAKeyPair = KEYRING.intermediate,
    *,
    subject: x509.Name | None = None,
) -> x509.Certificate:
    return sign_leaf(Leaf(key, names, lifetime, usages, subject), signer, NOW)


@pytest.mark.parametrize("key_type", KEYS)
def test_leaf_has_exactly_six_extensions(key_type: KeyType) -> None:
    certificate = leaf(pki.names("hello.test", ID.text), KEYS[key_type])
    assert sorted((extension.oid._name, extension.critical) for extension in certificate.extensions) == [
        ("authorityKeyIdentifier", False), ("basicConstraints", True), ("extendedKeyUsage", False), ("keyUsage", True),
        ("subjectAltName", False), ("subjectKeyIdentifier", False),
    ]  # fmt: skip
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    encipherment = ["key_encipherment"] if key_type.value.startswith("RSA") else []
    assert usage == pki.key_usage("digital_signature", *encipherment)
    assert public_bytes(certificate.public_key()) == public_bytes(KEYS[key_type])  # type: ignore[arg-type]  # ours


def test_key_identifier_is_that_of_the_intermediate() -> None:
    extensions = leaf().extensions
    issuer = KEYRING.intermediate.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    identifier = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert identifier.key_identifier == issuer.digest
    assert identifier.authority_cert_issuer is None


def test_first_dns_name_is_the_common_name() -> None:
    """For old clients that read only the subject."""
    certificate = leaf(pki.names("a.test", "b.test", ID.text))
    assert [(item.oid, item.value) for item in certificate.subject] == [(NameOID.COMMON_NAME, "a.test")]


@pytest.mark.parametrize("names", [ID_ONLY, Names.of([LONG], [ID]), None], ids=["no dns name", "too long", "omitted"])
def test_names_are_critical_without_a_subject(names: Names | None) -> None:
    """RFC 5280 section 4.2.1.6. A CA that constrains directory names omits the subject."""
    certificate = leaf(names) if names else leaf(pki.names("a.test"), subject=x509.Name([]))
    assert not certificate.subject.rdns
    assert certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).critical


def test_leaf_is_backdated_and_has_the_granted_lifetime() -> None:
    certificate = leaf(lifetime=timedelta(minutes=5))
    assert certificate.not_valid_before_utc == NOW - BACKDATE
    assert certificate.not_valid_after_utc == NOW + timedelta(minutes=5)


def test_leaf_never_outlives_its_intermediate() -> None:
    certificate = leaf(lifetime=timedelta(days=4000))
    assert certificate.not_valid_after_utc == KEYRING.intermediate.certificate.not_valid_after_utc
    with pytest.raises(CertmountError, match="has expired") as failure:
        sign_leaf(
            Leaf(KEYS[KeyType.EC_P256], Names(), timedelta(1), ()), KEYRING.intermediate, NOW + INTERMEDIATE_LIFETIME
        )
    assert failure.value.retryable


def test_serial_numbers_are_random() -> None:
    """Positive, and at most 20 octets (RFC 5280 section 4.1.2.2)."""
    serials = {leaf().serial_number for _ in range(20)}
    assert len(serials) == 20
    assert all(0 < serial < 2**159 for serial in serials)
    assert max(serials).bit_length() > 140


texts = st.one_of(strategies.dns_texts, strategies.uri_texts, strategies.ip_texts, strategies.email_texts)
any_names = st.lists(texts, max_size=12).map(lambda found: pki.names(ID.text, *found))


@pytest.mark.parametrize("usages", [(Usage.SERVER,), (Usage.CLIENT,), (Usage.CLIENT, Usage.SERVER), ALL_USAGES])
def test_leaf_has_only_the_granted_usages(usages: tuple[Usage, ...]) -> None:
    purposes = {Usage.SERVER: ExtendedKeyUsageOID.SERVER_AUTH, Usage.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH}
    found = leaf(usages=usages).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(found) == [purposes[usage] for usage in usages]


HASHES = {KeyType.EC_P256: "sha256", KeyType.EC_P384: "sha384", KeyType.RSA_3072: "sha256"}


@pytest.mark.parametrize("kind", [*HASHES, KeyType.ED25519, KeyType.ML_DSA_44])
def test_hash_matches_the_signing_key(kind: KeyType) -> None:
    signer = make_root("test", generate_key(kind), NOW, path_length=0)
    certificate = leaf(signer=signer)
    algorithm = certificate.signature_hash_algorithm
    assert (algorithm.name if algorithm else None) == HASHES.get(kind)
    certificate.verify_directly_issued_by(signer.certificate)


@given(any_names)
def test_subject_never_names_a_kubernetes_user_or_group(names: Names) -> None:
    """An API server that trusted this CA by mistake would read the common name as a user and the organization as a group."""
    subject = leaf(names).subject
    assert all(item.oid == NameOID.COMMON_NAME and ":" not in item.value for item in subject)
    assert len(subject.rdns) <= 1


@given(any_names)
def test_leaf_has_exactly_the_granted_names(names: Names) -> None:
    read = x509.load_der_x509_certificate(leaf(names).public_bytes(Encoding.DER))
    assert names_of(read.extensions) == names


class ExternalKey(ec.EllipticCurvePrivateKey):
    """A key whose private part is in a key store: it can only sign and return its public key."""

    def __init__(self) -> None:
        self._stored = ec.generate_private_key(ec.SECP256R1())

    def sign(self, data: Buffer, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        return self._stored.sign(data, signature_algorithm)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._stored.public_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._stored.curve

    @property
    def key_size(self) -> int:
        return self._stored.key_size

    exchange = private_numbers = private_bytes = __copy__ = __deepcopy__ = cast("Any", None)


def test_key_in_a_key_store_can_sign() -> None:
    """CAKeyPair uses a key only to sign and to return its public key, so it can be in an HSM."""
    signer = make_root("test", ExternalKey(), NOW, path_length=0)
    leaf(signer=signer).verify_directly_issued_by(signer.certificate)
