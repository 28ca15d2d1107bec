"""The CA's certificates, and what is not taken for one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store

from csi_driver.authority.ca.certificates import (
    INTERMEDIATE_LIFETIME,
    ROOT_LIFETIME,
    CAKeyPair,
    Leaf,
    key_usage,
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
from csi_driver.core.certificates.keys import encode_key, key_type_of
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import DNSName, Names
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


def test_new_ca_has_a_p384_root_and_a_p256_intermediate(keyring: Keyring) -> None:
    """The intermediate can sign leaf certificates only."""
    root, intermediate = keyring.root, keyring.intermediate.certificate
    assert isinstance(keyring.root_key, ec.EllipticCurvePrivateKey)
    assert isinstance(keyring.intermediate.key, ec.EllipticCurvePrivateKey)
    assert (keyring.root_key.curve.name, keyring.intermediate.key.curve.name) == ("secp384r1", "secp256r1")
    assert root.not_valid_after_utc == NOW + ROOT_LIFETIME
    assert intermediate.not_valid_after_utc == NOW + INTERMEDIATE_LIFETIME
    assert extensions(root) == {"BasicConstraints": True, "KeyUsage": True, "SubjectKeyIdentifier": False}
    assert extensions(intermediate) == {**extensions(root), "AuthorityKeyIdentifier": False}
    lengths = [
        certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        for certificate in (root, intermediate)
    ]
    assert lengths == [1, 0]
    root.verify_directly_issued_by(root)
    intermediate.verify_directly_issued_by(root)


def test_cas_have_different_subjects() -> None:
    """Path builders must not confuse them."""
    subjects = {make_keyring(NOW).root.subject for _ in range(2)}
    assert len(subjects) == 2


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
    """Not before, and from then on."""
    due = INTERMEDIATE_LIFETIME * 2 / 3
    assert not keyring.intermediate_due(NOW + due - timedelta(hours=1))
    assert keyring.intermediate_due(NOW + due + timedelta(hours=1))


def test_leaves_of_a_former_intermediate_stay_valid(keyring: Keyring) -> None:
    later = NOW + INTERMEDIATE_LIFETIME * 0.7
    names = Names.of(dns=[DNSName.parse("hello.test")])
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    old = sign_leaf(Leaf(key, names, timedelta(hours=1), (Usage.SERVER,)), keyring.intermediate, later)
    renewed = keyring.renew_intermediate(later)
    new = sign_leaf(Leaf(key, names, timedelta(hours=1), (Usage.SERVER,)), renewed.intermediate, later)
    assert renewed.root is keyring.root
    assert renewed.intermediate.certificate.subject != keyring.intermediate.certificate.subject
    verifier = PolicyBuilder().store(Store([keyring.root])).time(later)
    for leaf, signer in ((old, keyring.intermediate), (new, renewed.intermediate)):
        verifier.build_server_verifier(x509.DNSName("hello.test")).verify(leaf, [signer.certificate])


def test_intermediate_does_not_outlive_its_root(keyring: Keyring) -> None:
    renewed = keyring.renew_intermediate(NOW + ROOT_LIFETIME - timedelta(days=30))
    assert renewed.intermediate.certificate.not_valid_after_utc == keyring.root.not_valid_after_utc


def without(name: str) -> Callable[[Values], Values]:
    return lambda values: {key: value for key, value in values.items() if key != name}


def with_value(name: str, content: bytes) -> Callable[[Values], Values]:
    return lambda values: {**values, name: Secret(content)}


def from_other(*names: str) -> Callable[[Values], Values]:
    other = encode_keyring(make_keyring(NOW))
    return lambda values: {**values, **{name: other[name] for name in names}}


def root_of(keyring: Keyring) -> CAKeyPair:
    assert keyring.root_key is not None
    return CAKeyPair(keyring.root, keyring.root_key)


def leaf_as_intermediate(values: Values) -> Values:
    keyring = load_keyring(values, NOW, where="here")
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = sign_leaf(
        Leaf(key.public_key(), Names.of([DNSName.parse("a.test")]), timedelta(1), (Usage.SERVER,)),
        root_of(keyring),
        NOW,
    )
    return {**values, "intermediate.crt": Secret(encode_certificates([leaf])), "intermediate.key": encode_key(key)}


DAMAGES: dict[str, tuple[Callable[[Values], Values], str]] = {
    "no root": (without("root.crt"), "here root.crt: is missing"),
    "no intermediate": (without("intermediate.crt"), "here intermediate.crt: is missing"),
    "empty": (with_value("intermediate.key", b"\n"), "here intermediate.key: is missing"),
    "no certificate": (with_value("root.crt", b"hello"), "here root.crt: is not an X.509 certificate in PEM"),
    "a key for a certificate": (lambda v: {**v, "root.crt": v["root.key"]}, "here root.crt: is not an X.509"),
    "no key": (with_value("root.key", b"hello"), "here root.key: is not a private key in PEM"),
    "other root key": (
        from_other("root.key"),
        "here root.key: is not the key of the root that issued intermediate.crt",
    ),
    "other intermediate key": (from_other("intermediate.key"), "is not the key of intermediate.crt"),
    "other root": (from_other("root.crt", "root.key"), "here intermediate.crt: is not issued by root.crt"),
    "leaf as intermediate": (
        leaf_as_intermediate,
        "intermediate.crt: is not a CA certificate",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ca_is_rejected_with_the_reason(damage: str, keyring: Keyring) -> None:
    """The error names the value and never shows it."""
    change, words = DAMAGES[damage]
    values = change(dict(encode_keyring(keyring)))
    with pytest.raises(CertmountError) as refusal:
        load_keyring(values, NOW, where="here")
    assert refusal.value.reason is Reason.INVALID_CA
    assert words in str(refusal.value)
    assert "PRIVATE KEY" not in str(refusal.value)


def own_ca(*, usage: bool) -> Values:
    """Return an administrator's CA made by other tools: an RSA root and an Ed25519 intermediate."""
    root_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    key = ed25519.Ed25519PrivateKey.generate()
    root_name, name = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in ("root", "sub"))
    certificates = []
    for subject, public_key in ((root_name, root_key.public_key()), (name, key.public_key())):
        builder = (
            x509.CertificateBuilder(root_name, subject, public_key, x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=1))
            .not_valid_after(NOW + timedelta(days=100))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )
        if usage:
            builder = builder.add_extension(key_usage(), critical=True)
        certificates.append(Secret(builder.sign(root_key, SHA256()).public_bytes(Encoding.PEM)))
    return {
        "root.crt": certificates[0],
        "root.key": encode_key(root_key),
        "intermediate.crt": certificates[1],
        "intermediate.key": encode_key(key),
    }


def test_own_ca_of_other_algorithms_is_accepted() -> None:
    """Without a key usage, which allows any use. It signs leaf certificates and new intermediates."""
    keyring = load_keyring(own_ca(usage=False), NOW, where="here")
    names = Names.of(dns=[DNSName.parse("hello.test")])
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    for ring in (keyring, keyring.renew_intermediate(NOW)):
        leaf = sign_leaf(Leaf(key, names, timedelta(hours=1), (Usage.SERVER,)), ring.intermediate, NOW)
        leaf.verify_directly_issued_by(ring.intermediate.certificate)
        ring.intermediate.certificate.verify_directly_issued_by(ring.root)


def test_ca_without_the_usage_to_sign_is_rejected() -> None:
    with pytest.raises(CertmountError, match="is not a CA certificate"):
        load_keyring(own_ca(usage=True), NOW, where="here")


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
    for ring in (keyring, keyring.renew_intermediate(NOW)):
        for certificate in (ring.root, ring.intermediate.certificate):
            assert key_type_of(certificate.public_key()) is kind


def test_root_and_intermediate_contain_the_name_constraints() -> None:
    """Critical (RFC 5280 section 4.2.1.10), also in a renewed intermediate."""
    keyring = make_keyring(NOW, CAProfile(permitted=BOUNDS))
    for ring in (keyring, keyring.renew_intermediate(NOW)):
        for certificate in (ring.root, ring.intermediate.certificate):
            found = certificate.extensions.get_extension_for_class(x509.NameConstraints)
            assert found.critical
            assert (found.value.permitted_subtrees, found.value.excluded_subtrees) == (list(BOUNDS), None)


def test_requested_path_length_applies_to_the_root() -> None:
    keyring = make_keyring(NOW, CAProfile(path_length=3))
    lengths = [
        certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        for certificate in (keyring.root, keyring.intermediate.certificate)
    ]
    assert lengths == [3, 0]


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
