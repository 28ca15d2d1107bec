"""Certificates from DER parts have the same bytes as those of x509.CertificateBuilder."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.authority.ca import leaf_encoder
from csi_driver.authority.ca.certificates import BACKDATE, CAKeyPair, Leaf, make_root, sign_leaf
from csi_driver.authority.ca.leaf_encoder import LeafParts, sign_leaf_der
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.errors import CertmountError
from csi_driver.core.names import Names
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.spec import KeyType, Usage
from csi_driver.core.subject import Subject
from tests.unit.authority.ca.test_leaf import ID_ONLY, KEYRING, KEYS, NOW, ExternalKey, any_names

SIGNERS = {
    kind.value: make_root("test", generate_key(kind), NOW, path_length=0)
    for kind in (
        KeyType.EC_P256,
        KeyType.EC_P384,
        KeyType.EC_P521,
        KeyType.RSA_2048,
        KeyType.ED25519,
        KeyType.ML_DSA_44,
    )
}
USAGES = [(Usage.SERVER,), (Usage.CLIENT,), (Usage.CLIENT, Usage.SERVER), ALL_USAGES]
SUBJECTS = [None, x509.Name([]), Subject.parse("CN=shop,O=Exämple,C=DE").name]
NO_LIFETIME = timedelta(seconds=1)


def assert_equal(parts: LeafParts, leaf: Leaf, signer: CAKeyPair, now: datetime) -> None:
    built = sign_leaf(leaf, signer, now)
    tbs = parts.tbs(leaf, built.serial_number, now - BACKDATE, built.not_valid_after_utc)
    assert tbs == built.tbs_certificate_bytes


@pytest.mark.parametrize("key_type", KEYS)
@pytest.mark.parametrize("signer", SIGNERS)
def test_all_kinds_of_certificates(signer: str, key_type: KeyType) -> None:
    for usages, subject in itertools.product(USAGES, SUBJECTS):
        leaf = Leaf(KEYS[key_type], ID_ONLY, timedelta(hours=1), usages, subject)
        parts = LeafParts.of(sign_leaf(leaf, SIGNERS[signer], NOW))
        assert_equal(parts, leaf, SIGNERS[signer], NOW)


@given(any_names, st.sampled_from(SUBJECTS), st.timedeltas(NO_LIFETIME, timedelta(days=400)))
@settings(max_examples=500)
def test_any_names_and_lifetimes(names: Names, subject: x509.Name | None, lifetime: timedelta) -> None:
    leaf = Leaf(KEYS[KeyType.EC_P256], names, lifetime, ALL_USAGES, subject)
    parts = LeafParts.of(sign_leaf(Leaf(leaf.key, ID_ONLY, lifetime, ALL_USAGES), KEYRING.intermediate, NOW))
    assert_equal(parts, leaf, KEYRING.intermediate, NOW)


@given(st.integers(86_400, 32_000_000_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)))
@settings(max_examples=50)
def test_any_time(now: datetime) -> None:
    signer = make_root("test", generate_key(KeyType.ED25519), now, path_length=0)
    leaf = Leaf(KEYS[KeyType.EC_P256], ID_ONLY, timedelta(days=400), ALL_USAGES)
    assert_equal(LeafParts.of(sign_leaf(leaf, signer, now)), leaf, signer, now)


@given(st.integers(1, 2**159 - 1) | st.sampled_from([1, 127, 128, 255, 256, 2**159 - 1]))
def test_any_serial_number(serial: int) -> None:
    leaf, now = Leaf(KEYS[KeyType.EC_P256], ID_ONLY, timedelta(days=1), ALL_USAGES), NOW
    parts = LeafParts.of(sign_leaf(leaf, KEYRING.intermediate, now))
    tbs = parts.tbs(leaf, serial, now, now)
    der = leaf_encoder.encode(0x30, tbs + parts.algorithm + b"\x03\x01\x00")
    assert x509.load_der_x509_certificate(der).serial_number == serial


@pytest.mark.parametrize("signer", [*SIGNERS.values(), make_root("test", ExternalKey(), NOW, path_length=0)])
def test_signatures_are_valid(signer: CAKeyPair) -> None:
    leaf = Leaf(KEYS[KeyType.EC_P256], ID_ONLY, timedelta(days=1), ALL_USAGES)
    ders = [sign_leaf_der(leaf, signer, NOW) for _ in range(3)]
    certificates = [x509.load_der_x509_certificate(der) for der in ders]
    for certificate in certificates:
        certificate.verify_directly_issued_by(signer.certificate)
        assert names_of(certificate.extensions) == ID_ONLY
    assert len({certificate.serial_number for certificate in certificates}) == 3
    with pytest.raises(CertmountError, match="has expired"):
        sign_leaf_der(leaf, signer, NOW + timedelta(days=5000))


def test_kind_whose_parts_differ_is_always_built(monkeypatch: pytest.MonkeyPatch) -> None:
    signer = make_root("test", generate_key(KeyType.EC_P256), NOW, path_length=0)
    leaf = Leaf(KEYS[KeyType.EC_P256], ID_ONLY, timedelta(days=1), ALL_USAGES)
    monkeypatch.setattr(leaf_encoder, "_SHARED_EXTENSIONS", 3)
    for _ in range(3):
        certificate = x509.load_der_x509_certificate(sign_leaf_der(leaf, signer, NOW))
        assert len(certificate.extensions) == 6
        assert certificate.public_bytes(Encoding.DER)
