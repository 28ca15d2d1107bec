"""An administrator's own CA: what is accepted, and what is rejected because verifiers would reject it later."""

from __future__ import annotations

import base64
import functools
import itertools
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.ca.certificates import Leaf, key_usage, sign_leaf
from csi_driver.authority.ca.keyring import Keyring, encode_keyring, make_keyring
from csi_driver.authority.ca.keyring_loader import load_keyring
from csi_driver.core.certificates.keys import PrivateKey, encode_key, generate_key
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType, Usage
from tests.support.requirements import require_program
from tests.unit.core import pki
from tests.unit.core.pki import NOW, Signer, Validity

Values = Mapping[str, Secret[bytes]]
YEARS = Validity(end=timedelta(days=1000))
PASSWORD = Secret(b"canary-password")
CA = functools.partial(pki.authority, validity=YEARS)


def key(number: int = 0) -> PrivateKey:
    return pki.key_of(KeyType.EC_P256, number)


ROOT = CA("root", key=key())
MIDDLE = CA("middle", ROOT, key=key(1))
LOWER = CA("lower", MIDDLE, key=key(2), path_length=0)


def values(roots: Sequence[Signer], intermediates: Sequence[Signer], root_key: PrivateKey | None = None) -> Values:
    found = {
        "root.crt": Secret(encode_certificates([root.certificate for root in roots])),
        "intermediate.crt": Secret(encode_certificates([one.certificate for one in intermediates])),
        "intermediate.key": encode_key(intermediates[0].key),
    }
    return {**found, "root.key": encode_key(root_key)} if root_key else found


def load(given: Values, password: Secret[bytes] | None = None) -> Keyring:
    return load_keyring(given, NOW, where="here", password=password)


def error_of(given: Values, password: Secret[bytes] | None = None) -> str:
    with pytest.raises(CertmountError) as raised:
        load(given, password)
    assert raised.value.reason is Reason.INVALID_CA
    assert "canary" not in str(raised.value)
    assert "PRIVATE" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("given", [{}, {"root.key": Secret(b"")}, {"root.key": Secret(b"\n")}])
def test_root_key_can_be_offline(given: Values) -> None:
    """It is missing or, because some tools can't omit a value, blank. The administrator is warned in time of each end."""
    keyring = load({**values([ROOT], [MIDDLE]), **given})
    assert keyring.root_key is None
    end = MIDDLE.certificate.not_valid_after_utc
    assert not keyring.intermediate_due(end)
    with pytest.raises(ValueError, match="can't renew the intermediate"):
        keyring.renew_intermediate(NOW)
    assert keyring.expiring(end - timedelta(days=91)) == ()
    found = [(each.name, each.not_after) for each in keyring.expiring(end - timedelta(days=89))]
    assert sorted(found) == [("intermediate.crt", end), ("root.crt", end)]


def test_no_warning_for_the_intermediate_that_certmount_renews() -> None:
    """It is renewed by itself; the root's end is its owner's business."""
    keyring = make_keyring(NOW)
    assert keyring.expiring(NOW + timedelta(days=364)) == ()
    assert [each.name for each in keyring.expiring(NOW + timedelta(days=3600))] == ["root.crt"]


def test_longer_chain_is_sent_with_each_leaf() -> None:
    """The root is omitted, even if it is at the end of the chain."""
    for further in ([], [ROOT]):
        keyring = load(values([ROOT], [LOWER, MIDDLE, *further], ROOT.key))
        assert keyring.intermediates == (LOWER.certificate, MIDDLE.certificate)
        assert not keyring.renewable  # the key of MIDDLE is elsewhere


def test_root_at_the_end_of_the_chain_comes_first() -> None:
    """All roots are trusted. The others can be expired or not valid yet, as in the middle of a change of roots."""
    ended = CA("ended", key=key(3), validity=Validity(end=timedelta(0)))
    coming = CA("coming", key=key(4), validity=Validity(start=timedelta(1), end=timedelta(9)))
    keyring = load(values([ended, coming, ROOT], [MIDDLE]))
    assert keyring.roots == (ROOT.certificate, ended.certificate, coming.certificate)
    assert keyring.root == ROOT.certificate


def test_valid_certificate_of_a_root_is_preferred() -> None:
    """A root can have been signed again with its old key."""
    former = CA("root", key=key(), validity=Validity(end=timedelta(0)))
    assert load(values([former, ROOT], [MIDDLE])).root == ROOT.certificate


def test_store_can_contain_two_keyrings() -> None:
    """Errors name the value as it is in the store."""
    one, other = make_keyring(NOW), make_keyring(NOW)
    both = {**encode_keyring(one), **encode_keyring(other, "next-")}
    assert load(both).root == one.root
    loaded = load_keyring(both, NOW, where="here", prefix="next-")
    assert loaded.root == other.root
    assert encode_keyring(loaded) == encode_keyring(other)
    damaged = {**both, "next-root.key": both["root.key"]}
    with pytest.raises(CertmountError, match=r"here next-root\.key: is not the key of the root"):
        load_keyring(damaged, NOW, where="here", prefix="next-")


FORMATS = {"PKCS#8": PrivateFormat.PKCS8, "traditional": PrivateFormat.TraditionalOpenSSL}
BYO_KEYS: dict[str, Callable[[], PrivateKey]] = {
    **{kind.value: functools.partial(pki.key_of, kind) for kind in KeyType if kind is not KeyType.RSA_4096},
    "EC-P521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RSA-2560": lambda: rsa.generate_private_key(65537, 2560),
    "RSA-2048 with e=3": lambda: rsa.generate_private_key(3, 2048),
}


def builder_of(of: PrivateKey) -> x509.CertificateBuilder:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
    builder = x509.CertificateBuilder(name, name, of.public_key(), 7, NOW, NOW + timedelta(days=500))
    return builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)


def self_signed(of: PrivateKey) -> Signer:
    """Return a root with a key of any type, and without a key usage, which allows any use."""
    identifier = x509.SubjectKeyIdentifier.from_public_key(of.public_key())
    return Signer(pki.sign(builder_of(of).add_extension(identifier, critical=False), of), of)


@pytest.mark.parametrize("root_kind, kind", [*((kind, kind) for kind in BYO_KEYS), ("RSA-2048", "Ed25519")])
def test_every_key_type_signs_and_is_renewed_with_the_same_type(root_kind: str, kind: str) -> None:
    """Also without a key usage, which allows any use."""
    root, own = self_signed(BYO_KEYS[root_kind]()), BYO_KEYS[kind]()
    keyring = load(values([root], [CA("sub", root, key=own, extensions=[])], root.key))
    leaf = Leaf(key().public_key(), pki.names("a.test"), timedelta(hours=1), (Usage.SERVER,))
    for ring in (keyring, load(encode_keyring(keyring.renew_intermediate(NOW)))):
        intermediate = ring.intermediate.certificate
        sign_leaf(leaf, ring.intermediate, NOW).verify_directly_issued_by(intermediate)
        intermediate.verify_directly_issued_by(ring.root)
        assert type(intermediate.public_key()) is type(own.public_key())
        assert ring.intermediate.key.public_key() == intermediate.public_key()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", [KeyType.EC_P256, KeyType.RSA_2048])
@pytest.mark.parametrize("encryption", [NoEncryption(), BestAvailableEncryption(PASSWORD.reveal())])
def test_keys_are_read_in_every_format(form: str, kind: KeyType, encryption: KeySerializationEncryption) -> None:
    """Encrypted keys go back to the store unchanged."""
    root = CA("root", key=pki.key_of(kind))
    pem = root.key.private_bytes(Encoding.PEM, FORMATS[form], encryption)
    sub = CA("sub", root, key=key(1))
    given = {**values([root], [sub]), "root.key": Secret(pem)}
    keyring = load(given, password=PASSWORD)
    assert keyring.root_key is not None
    assert keyring.encrypted == (not isinstance(encryption, NoEncryption))
    assert keyring.renewable != keyring.encrypted
    assert encode_keyring(keyring) == given
    assert "canary" not in repr(keyring)


def test_errors_distinguish_missing_and_wrong_passwords() -> None:
    pem = Secret(ROOT.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD.reveal())))
    given = {**values([ROOT], [MIDDLE]), "root.key": pem, "intermediate.key": pem}
    for password in (None, Secret(b"")):
        text = error_of(given, password)
        assert text.count("is encrypted, and no password is configured") == 2
    assert error_of(given, password=Secret(b"other")).count("is encrypted with a different password, or damaged") == 2
    cut = {**given, "root.key": Secret(pem.reveal().replace(b"M", b"A", 3))}
    assert "root.key: is encrypted with a different password, or damaged" in error_of(cut, password=PASSWORD)


WEAK: dict[str, tuple[Callable[[], object], str]] = {
    "RSA-1024": (lambda: rsa.generate_private_key(65537, 1024), "an RSA key of 1024 bits; use at least 2048"),  # noqa: S505  # weak on purpose
    "secp256k1": (lambda: ec.generate_private_key(ec.SECP256K1()), "an unsupported key"),
    "Ed448": (ed448.Ed448PrivateKey.generate, "an unsupported key"),
    "DSA": (lambda: dsa.generate_private_key(2048), "an unsupported key"),
}


@pytest.mark.parametrize("kind", WEAK)
def test_weak_keys_are_rejected(kind: str) -> None:
    make, words = WEAK[kind]
    weak: PrivateKey = make()  # type: ignore[assignment]  # an unsupported type on purpose
    pem = Secret(weak.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert f"intermediate.key: is {words}" in error_of({**values([ROOT], [MIDDLE]), "intermediate.key": pem})
    certificate = Secret(encode_certificates([CA("sub", ROOT, key=weak).certificate]))
    assert f"intermediate.crt: has {words}" in error_of({**values([ROOT], [MIDDLE]), "intermediate.crt": certificate})


UNKNOWN = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")
OTHER_NAMES = x509.NameConstraints([x509.RegisteredID(ObjectIdentifier("1.2.3"))], None)
SERVERS_ONLY = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
BOTH_ENDS = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
ANY = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
LEAF_USAGE = key_usage()
SHORT_ROOT = CA("short", key=key(5), path_length=0)
STRANGER = CA("stranger", key=key(6))
LATE, ENDED = Validity(start=timedelta(1), end=timedelta(9)), Validity(end=timedelta(0))
SUB = functools.partial(CA, "sub", ROOT, key=key(7))

LACKS = "has an extended key usage that excludes TLS servers or TLS clients"
UNSUPPORTED = "has the critical extension 1.2.3.4, which certmount doesn't support"
UNCHECKED = "has name constraints of a type that certmount can't check: RegisteredID"
NO_ROOM = "has the path length 0; the intermediates below it need 1"

FAULTS: dict[str, tuple[Values, str]] = {
    "no CA": (values([ROOT], [SUB(ca=False)]), "intermediate.crt: is not a CA certificate"),
    "may not sign": (values([ROOT], [SUB(extensions=[LEAF_USAGE])]), "its key usage lacks keyCertSign"),
    "root may not sign": (values([CA("r", extensions=[LEAF_USAGE])], [MIDDLE]), "root.crt: is not a CA certificate"),
    "servers only": (values([ROOT], [SUB(extensions=[pki.CA_USAGE, SERVERS_ONLY])]), f"intermediate.crt: {LACKS}"),
    "unknown critical": (values([ROOT], [SUB(extensions=[pki.CA_USAGE, UNKNOWN])]), f"intermediate.crt: {UNSUPPORTED}"),
    "other names": (values([ROOT], [SUB(extensions=[pki.CA_USAGE, OTHER_NAMES])]), UNCHECKED),
    "no room": (values([SHORT_ROOT], [CA("sub", SHORT_ROOT, key=key(7))]), f"root.crt: {NO_ROOM}"),
    "no room below": (values([ROOT], [CA("sub", LOWER, key=key(7)), LOWER, MIDDLE]), f"intermediate.crt: {NO_ROOM}"),
    "another's": (values([STRANGER], [MIDDLE]), "intermediate.crt: is not issued by root.crt"),
    "another's, two roots": (values([STRANGER, SHORT_ROOT], [MIDDLE]), "is not issued by any certificate of root.crt"),
    "wrong order": (values([ROOT], [MIDDLE, LOWER]), "certificate 1 is not issued by certificate 2"),
    "a gap": (values([ROOT], [LOWER]), "intermediate.crt: is not issued by root.crt"),
    "no root": (values([MIDDLE], [LOWER]), "root.crt: is not self-signed"),
    "ended": (values([ROOT], [SUB(validity=ENDED)]), "intermediate.crt: expired at"),
    "ended above": (
        values([ROOT], [CA("low", SUB(validity=ENDED)), SUB(validity=ENDED)], ROOT.key),
        "intermediate.crt: expired at",
    ),
    "not yet": (values([ROOT], [SUB(validity=LATE)], ROOT.key), "intermediate.crt: is not valid before"),
    "ended root": (values([CA("r", key=key(), validity=ENDED)], [CA("s", CA("r", key=key()))]), "root.crt: expired at"),
    "too many": (values([ROOT] * 9, [MIDDLE]), "root.crt: contains 9 certificates; the maximum is 8"),
    "the second": (values([ROOT], [LOWER, SUB(ca=False)]), "intermediate.crt: certificate 2 is not a CA certificate"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_ca_that_verifiers_would_reject_is_rejected(name: str) -> None:
    given, words = FAULTS[name]
    assert words in error_of(given)


def test_certificate_without_key_identifier_is_rejected() -> None:
    """The strict mode of OpenSSL, Python's default since 3.13, rejects it too."""
    root = Signer(pki.sign(builder_of(key()), key()), key())
    assert "root.crt: has no subject key identifier" in error_of(values([root], [MIDDLE]))


@pytest.mark.parametrize("extension", [BOTH_ENDS, ANY], ids=["both ends", "any"])
def test_renewal_keeps_extended_key_usage_and_constraints(extension: x509.ExtendedKeyUsage) -> None:
    constraints = x509.NameConstraints([x509.DNSName("example.com")], None)
    sub = SUB(extensions=[pki.CA_USAGE, extension, constraints])
    keyring = load(values([ROOT], [sub], ROOT.key)).renew_intermediate(NOW)
    successor = keyring.intermediate.certificate
    for value in (extension, constraints):
        found = successor.extensions.get_extension_for_class(type(value))
        assert (found.value, found.critical) == (value, True)
    assert successor.subject != sub.certificate.subject
    assert successor.subject.rfc4514_string().startswith("CN=sub ")


def test_renewal_changes_only_the_suffix_of_the_name() -> None:
    """Directory names can be constrained."""
    keyring = make_keyring(NOW)
    names = set()
    for _ in range(5):
        keyring = keyring.renew_intermediate(NOW)
        names.add(keyring.intermediate.certificate.subject.rfc4514_string())
    assert len(names) == 5
    assert all(re.fullmatch("CN=certmount intermediate [^ ,]{8},O=certmount", name) for name in names)


def test_key_for_rsa_pss_only_is_rejected() -> None:
    """Cryptography loads it as any RSA key, but verifiers would reject its signatures."""
    command = [require_program("openssl"), "req", "-x509", "-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"]
    command += ["-noenc", "-keyout", "/dev/null", "-subj", "/CN=pss", "-days", "30"]
    pem = subprocess.run(command, capture_output=True, check=True).stdout
    assert "root.crt: has a key for RSA-PSS only" in error_of({**values([ROOT], [MIDDLE]), "root.crt": Secret(pem)})


def test_keys_of_other_certificates_are_rejected() -> None:
    other = {"intermediate.key": encode_key(generate_key(KeyType.ED25519))}
    text = error_of({**values([STRANGER, ROOT], [MIDDLE], STRANGER.key), **other})
    assert "here root.key: is not the key of the root that issued intermediate.crt" in text
    assert "here intermediate.key: is not the key of intermediate.crt" in text


OFFLINE = {**values([ROOT], [LOWER, MIDDLE]), "root.key": encode_key(ROOT.key)}
JUNK = st.one_of(
    st.binary(max_size=80),
    st.sampled_from([b"", b"-----BEGIN CERTIFICATE-----", *(one.reveal() for one in OFFLINE.values())]),
)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(
    st.sampled_from(sorted(OFFLINE)), st.booleans(), st.integers(0, 10_000), st.integers(0, 7), st.binary(max_size=3)
)
def test_bit_flip_is_rejected_or_harmless(name: str, in_der: bool, at: int, bit: int, extra: bytes) -> None:
    """The result is InvalidCA, or a keyring whose signatures verify, whether the bit is in the PEM text or in the DER."""
    text, label = OFFLINE[name].reveal(), "PRIVATE KEY" if name.endswith("key") else "CERTIFICATE"
    content = bytearray(base64.b64decode(b"".join(text.split(b"-----")[2].split())) if in_der else text)
    content[at % len(content)] ^= 1 << bit
    if in_der:
        further = b"".join(text.split(b"-----END CERTIFICATE-----\n", 1)[1:])
        body = base64.encodebytes(content).decode()
        content = bytearray(f"-----BEGIN {label}-----\n{body}-----END {label}-----\n".encode() + further)
    check_loaded_or_rejected({**OFFLINE, name: Secret(bytes(content) + extra)})


@given(st.dictionaries(st.sampled_from(sorted(OFFLINE)), JUNK.map(Secret)), st.one_of(st.none(), JUNK.map(Secret)))
def test_arbitrary_values_are_rejected_or_valid(given_values: Values, password: Secret[bytes] | None) -> None:
    check_loaded_or_rejected(given_values, password)


def check_loaded_or_rejected(given_values: Values, password: Secret[bytes] | None = None) -> None:
    try:
        keyring = load(given_values, password)
    except CertmountError as error:
        assert error.reason is Reason.INVALID_CA
        return
    leaf = Leaf(key().public_key(), pki.names("a.test"), timedelta(hours=1), (Usage.SERVER,))
    issuers = (*keyring.intermediates, keyring.root)
    for certificate, issuer in itertools.pairwise((sign_leaf(leaf, keyring.intermediate, NOW), *issuers)):
        certificate.verify_directly_issued_by(issuer)
