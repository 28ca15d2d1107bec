"""The CA's certificates, and what is not taken for one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store

from csi_driver.authority.ca.certificates import (
    INTERMEDIATE_LIFETIME,
    ROOT_LIFETIME,
    CAKeyPair,
    Leaf,
    sign_leaf,
)
from csi_driver.authority.ca.keyring import (
    AUTHORITY_KEY_TYPES,
    CAProfile,
    Keyring,
    encode_keyring,
    make_keyring,
    profile_of,
)
from csi_driver.authority.ca.keyring_loader import load_keyring
from csi_driver.core.certificates.keys import key_type_of
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType, Usage
from tests.unit.authority.clock import Clock
from tests.unit.core import pki

NOW = Clock().utc()
Values = dict[str, Secret[bytes]]


@pytest.fixture(scope="module")
def keyring() -> Keyring:
    return make_keyring(NOW)


def extensions(certificate: x509.Certificate) -> dict[str, bool]:
    return {type(extension.value).__name__: extension.critical for extension in certificate.extensions}


def path_lengths(keyring: Keyring) -> list[int | None]:
    constraints = (one.extensions.get_extension_for_class(x509.BasicConstraints) for one in certificates(keyring))
    return [one.value.path_length for one in constraints]


def certificates(keyring: Keyring) -> tuple[x509.Certificate, x509.Certificate]:
    return keyring.root, keyring.intermediate.certificate


def test_new_ca_has_a_p384_root_and_a_p256_intermediate(keyring: Keyring) -> None:
    root, intermediate = certificates(keyring)
    assert [key_type_of(one.public_key()) for one in (root, intermediate)] == [KeyType.EC_P384, KeyType.EC_P256]
    assert root.not_valid_after_utc == NOW + ROOT_LIFETIME
    assert intermediate.not_valid_after_utc == NOW + INTERMEDIATE_LIFETIME
    assert extensions(root) == {"BasicConstraints": True, "KeyUsage": True, "SubjectKeyIdentifier": False}
    assert extensions(intermediate) == {**extensions(root), "AuthorityKeyIdentifier": False}
    assert path_lengths(keyring) == [1, 0]
    root.verify_directly_issued_by(root)
    intermediate.verify_directly_issued_by(root)


def test_cas_have_different_subjects(keyring: Keyring) -> None:
    """Path builders must not confuse them."""
    assert make_keyring(NOW).root.subject != keyring.root.subject


def test_keyring_is_loaded_as_saved(keyring: Keyring) -> None:
    loaded = load_keyring(encode_keyring(keyring), NOW, where="here")
    assert loaded.root == keyring.root
    assert loaded.intermediate.certificate == keyring.intermediate.certificate
    assert encode_keyring(loaded) == encode_keyring(keyring)


def test_repr_contains_no_keys(keyring: Keyring) -> None:
    for name, value in encode_keyring(keyring).items():
        if name.endswith(".key"):
            assert "PRIVATE KEY" in value.reveal().decode()
    assert "PRIVATE" not in repr(keyring) + repr(encode_keyring(keyring))


def test_intermediate_is_renewed_after_two_thirds_of_its_lifetime(keyring: Keyring) -> None:
    due = INTERMEDIATE_LIFETIME * 2 / 3
    assert not keyring.intermediate_due(NOW + due - timedelta(hours=1))
    assert keyring.intermediate_due(NOW + due + timedelta(hours=1))


def test_leaves_of_a_former_intermediate_stay_valid(keyring: Keyring) -> None:
    later = NOW + INTERMEDIATE_LIFETIME * 0.7
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    leaf = Leaf(key, pki.names("hello.test"), timedelta(hours=1), (Usage.SERVER,))
    renewed = keyring.renew_intermediate(later)
    assert renewed.root is keyring.root
    assert renewed.intermediate.certificate.subject != keyring.intermediate.certificate.subject
    verifier = PolicyBuilder().store(Store([keyring.root])).time(later)
    for signer in (keyring.intermediate, renewed.intermediate):
        signed = sign_leaf(leaf, signer, later)
        verifier.build_server_verifier(x509.DNSName("hello.test")).verify(signed, [signer.certificate])


def test_intermediate_does_not_outlive_its_root(keyring: Keyring) -> None:
    renewed = keyring.renew_intermediate(NOW + ROOT_LIFETIME - timedelta(days=30))
    assert renewed.intermediate.certificate.not_valid_after_utc == keyring.root.not_valid_after_utc


def test_intermediate_is_not_renewed_for_no_longer_validity() -> None:
    """Otherwise, a replica renews it every few seconds before the root expires, and fails after that."""
    end = NOW + ROOT_LIFETIME
    keyring = make_keyring(NOW).renew_intermediate(end - timedelta(days=30))
    for left in (timedelta(days=1), timedelta(seconds=10), timedelta(), -timedelta(days=1)):
        assert not keyring.intermediate_due(end - left)


def without(name: str) -> Callable[[Values], Values]:
    return lambda values: {key: value for key, value in values.items() if key != name}


def with_value(name: str, content: bytes) -> Callable[[Values], Values]:
    return lambda values: {**values, name: Secret(content)}


def from_other(*names: str) -> Callable[[Values], Values]:
    other = encode_keyring(make_keyring(NOW))
    return lambda values: {**values, **{name: other[name] for name in names}}


DAMAGES: dict[str, tuple[Callable[[Values], Values], str]] = {
    "no root": (without("root.crt"), "here root.crt: is missing"),
    "no intermediate": (without("intermediate.crt"), "here intermediate.crt: is missing"),
    "empty": (with_value("intermediate.key", b"\n"), "here intermediate.key: is missing"),
    "no certificate": (with_value("root.crt", b"hello"), "here root.crt: is not an X.509 certificate in PEM"),
    "a key for a certificate": (lambda v: {**v, "root.crt": v["root.key"]}, "here root.crt: is not an X.509"),
    "no key": (with_value("root.key", b"hello"), "here root.key: is not a private key in PEM"),
    "other root": (from_other("root.crt", "root.key"), "here intermediate.crt: is not issued by root.crt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ca_is_rejected_with_the_reason(damage: str, keyring: Keyring) -> None:
    change, words = DAMAGES[damage]
    values = change(dict(encode_keyring(keyring)))
    with pytest.raises(CertmountError) as refusal:
        load_keyring(values, NOW, where="here")
    assert refusal.value.reason is Reason.INVALID_CA
    assert words in str(refusal.value)
    assert "PRIVATE KEY" not in str(refusal.value)


def test_error_lists_all_faults(keyring: Keyring) -> None:
    values = without("intermediate.key")(with_value("intermediate.crt", b"x")(dict(encode_keyring(keyring))))
    with pytest.raises(CertmountError, match=r"\(1\).*intermediate\.crt.*\(2\).*intermediate\.key"):
        load_keyring(values, NOW, where="here")


@pytest.mark.parametrize("moment", [NOW + ROOT_LIFETIME, NOW - timedelta(days=1)])
def test_root_that_is_not_valid_now_is_rejected(moment: object, keyring: Keyring) -> None:
    with pytest.raises(CertmountError, match=r"root\.crt: (expired at|is not valid before)"):
        load_keyring(encode_keyring(keyring), moment, where="here")  # type: ignore[arg-type]  # both are datetimes


def test_expired_intermediate_is_accepted_for_renewal(keyring: Keyring) -> None:
    later = NOW + INTERMEDIATE_LIFETIME * 2
    assert load_keyring(encode_keyring(keyring), later, where="here").intermediate_due(later)


def test_root_is_the_same_in_pem_and_der(keyring: Keyring) -> None:
    assert (x509.load_pem_x509_certificate(keyring.roots_pem).public_bytes(Encoding.DER),) == keyring.roots_der


DESIGNED = [kind for kind in AUTHORITY_KEY_TYPES if kind is not KeyType.RSA_4096]
BOUNDS = tuple(map(parse_constraint, ("dns:example.com", "uri:cluster.local", "ip:10.0.0.0/8", "email:example.com")))


@pytest.mark.parametrize("kind", DESIGNED)
def test_new_ca_has_the_requested_key_type(kind: KeyType) -> None:
    """So has a renewed intermediate."""
    keyring = load_keyring(encode_keyring(make_keyring(NOW, CAProfile(kind))), NOW, where="here")
    for certificate in (*certificates(keyring), *certificates(keyring.renew_intermediate(NOW))):
        assert key_type_of(certificate.public_key()) is kind


def test_root_and_intermediate_contain_the_name_constraints() -> None:
    """Critical (RFC 5280 section 4.2.1.10), also in a renewed intermediate."""
    keyring = make_keyring(NOW, CAProfile(permitted=BOUNDS))
    for certificate in (*certificates(keyring), *certificates(keyring.renew_intermediate(NOW))):
        found = certificate.extensions.get_extension_for_class(x509.NameConstraints)
        assert found.critical
        assert (found.value.permitted_subtrees, found.value.excluded_subtrees) == (list(BOUNDS), None)


def test_requested_path_length_applies_to_the_root() -> None:
    assert path_lengths(make_keyring(NOW, CAProfile(path_length=3))) == [3, 0]


EXCLUDED = (x509.DNSName("b.example.com"),)


@pytest.mark.parametrize(
    "design",
    [
        CAProfile(),
        CAProfile(KeyType.ED25519),
        CAProfile(KeyType.ML_DSA_44, path_length=2),
        CAProfile(permitted=BOUNDS),
        CAProfile(KeyType.EC_P256, BOUNDS[:2], EXCLUDED),
    ],
)
def test_profile_of_a_new_ca_is_found_in_its_certificates(design: CAProfile) -> None:
    """The next CA gets the same names without a stored profile."""
    keyring = load_keyring(encode_keyring(make_keyring(NOW, design)), NOW, where="here")
    found = profile_of(keyring)
    assert set(found.permitted) == set(design.permitted)
    assert (found.key_type, found.excluded, found.path_length) == (design.key_type, design.excluded, design.path_length)


def test_profile_of_an_own_ca_combines_the_constraints_of_its_chain() -> None:
    """For each type of name, the lowest certificate decides."""
    names = {text: parse_constraint(text) for text in ("dns:test", "dns:a.test", "ip:10.0.0.0/8")}
    above = x509.NameConstraints([names["dns:test"], names["ip:10.0.0.0/8"]], EXCLUDED)
    below = x509.NameConstraints([names["dns:a.test"]], EXCLUDED)
    root = pki.authority("root", extensions=[pki.CA_USAGE, above])
    lower = pki.authority("lower", root, extensions=[pki.CA_USAGE, below])
    found = profile_of(Keyring((root.certificate,), None, CAKeyPair(lower.certificate, lower.key)))
    assert found == CAProfile(KeyType.EC_P256, (names["dns:a.test"], names["ip:10.0.0.0/8"]), EXCLUDED)
