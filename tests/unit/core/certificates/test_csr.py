"""CSRs: signature, key type and names."""

from __future__ import annotations

import functools
import itertools
from ipaddress import ip_address, ip_network

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from csi_driver.core.certificates.csr import MAX_CSR_BYTES, ParsedCSR, build_csr, parse_csr
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import IPAddress, Name, Names
from csi_driver.core.spec import MAX_NAMES, KeyType
from tests.support import hostile_csrs
from tests.support.hostile_csrs import der_value
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import OTHER_KEYS, key_of, names
from tests.unit.core.strategies import dns_texts, email_texts, ip_texts, uri_texts

# cryptography warns about unusual input that it accepts. Warnings are errors in tests.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")

SMALL_KINDS = (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.ED25519)


@functools.cache
def good_csr(kind: KeyType) -> bytes:
    return build_csr(key_of(kind), names("www.example.com", "*.example.com", "spiffe://td.example/ns/web/sa/edge"))


def csr_with(*general_names: x509.GeneralName, extensions: tuple[x509.ExtensionType, ...] = ()) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if general_names:
        builder = builder.add_extension(x509.SubjectAlternativeName(general_names), critical=True)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key_of(KeyType.EC_P256), SHA256()).public_bytes(Encoding.DER)


def rejection(der: bytes) -> str:
    with pytest.raises(CertmountError, match=r"^InvalidCSR: ") as raised:
        parse_csr(der)
    assert str(raised.value).isprintable()
    return str(raised.value)


@pytest.mark.parametrize(
    "requests",
    list(itertools.product([hostile_csrs.EXTENSION_REQUEST, hostile_csrs.MICROSOFT_EXTENSION_REQUEST], repeat=2)),
    ids=lambda requests: " ".join(f"{each[-1]}" for each in requests),
)
def test_csr_that_programs_read_differently_is_rejected(requests: tuple[bytes, bytes]) -> None:
    """Such as an issuer in Go, which reads only the second one here: it would sign a name that the policy has not seen."""
    attributes = b"".join(
        der_value(0x30, request, der_value(0x31, der_value(0x30, hostile_csrs.names(der_value(0x82, name)))))
        for request, name in zip(requests, (b"allowed.example.com", b"other.example.com"), strict=True)
    )
    der = hostile_csrs.signed(hostile_csrs.content(attributes=attributes))
    assert "has more than one request for extensions" in rejection(der)


@given(st.sampled_from(SMALL_KINDS), st.lists(st.one_of(dns_texts, uri_texts, ip_texts, email_texts), max_size=10))
def test_csr_parses_to_the_same_names_and_key(kind: KeyType, texts: list[str]) -> None:
    wanted = names(*texts)
    der = build_csr(key_of(kind), wanted)
    request = parse_csr(der)
    assert (request.der, request.names, request.key_type) == (der, wanted, kind)
    assert public_bytes(request.public_key) == public_bytes(key_of(kind).public_key())


@given(st.lists(email_texts, min_size=1, max_size=3))
def test_email_addresses_do_not_depend_on_the_python_release(texts: list[str]) -> None:
    """email.utils.parseaddr differs between patch releases. A version that rejects everything has no effect."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("cryptography.x509.general_name.parseaddr", lambda _: ("", ""))
        assert parse_csr(build_csr(key_of(KeyType.EC_P256), names(*texts))).names == names(*texts)
        for text in texts:
            domain = text.partition("@")[2]
            for base in (text, domain, f".{domain}"):
                assert parse_constraint(f"email:{base}").value == base


def is_equivalent(one: bytes, other: bytes) -> bool:
    first, second = x509.load_der_x509_csr(one), x509.load_der_x509_csr(other)
    return (first.tbs_certrequest_bytes, first.signature) == (second.tbs_certrequest_bytes, second.signature)


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_flipped_bit_is_detected(kind: KeyType) -> None:
    der = good_csr(kind)
    for bit in range(len(der) * 8):
        flipped = bytearray(der)
        flipped[bit // 8] ^= 1 << bit % 8
        request = outcome(functools.partial(parse_csr, bytes(flipped)), CertmountError)
        assert isinstance(request, CertmountError) or is_equivalent(request.der, der), bit


@given(
    st.sampled_from(SMALL_KINDS),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 3000),
)
def test_damaged_csr_is_rejected(kind: KeyType, damage: list[tuple[int, int]], length: int) -> None:
    der = good_csr(kind)
    changed = bytearray(der[:length] if length < len(der) else der + bytes(length % 7))
    for position, byte in damage:
        if changed:
            changed[position % len(changed)] = byte
    request = outcome(lambda: parse_csr(bytes(changed)), CertmountError)
    assert isinstance(request, CertmountError) or is_equivalent(request.der, der)


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=100).map(lambda tail: b"\x30\x82\x01\x00" + tail)))
@example(b"")
@example(b"-----BEGIN CERTIFICATE REQUEST-----\n")
@example(b"\x30" * 10_000)
def test_arbitrary_bytes_are_rejected(der: bytes) -> None:
    assert "certificate signing request" in rejection(der)


def test_too_large_csr_is_rejected_before_parsing() -> None:
    assert f"use at most {MAX_CSR_BYTES}" in rejection(good_csr(KeyType.EC_P256) + bytes(MAX_CSR_BYTES))


@pytest.mark.parametrize("name", [name for name in OTHER_KEYS if name != "X25519"])  # which cannot sign
def test_unsupported_key_type_is_rejected(name: str) -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = builder.sign(OTHER_KEYS[name](), None if name == "Ed448" else SHA256())
    words = "has an unsupported key type; use one of EC-P256, EC-P384, EC-P521, RSA-2048"
    assert words in rejection(csr.public_bytes(Encoding.DER))


def test_csr_with_a_replaced_key_is_rejected() -> None:
    mine, theirs = key_of(KeyType.EC_P256), key_of(KeyType.EC_P256, 1)
    der = build_csr(mine, Names())
    forged = der.replace(public_bytes(mine.public_key()), public_bytes(theirs.public_key()))
    assert forged != der
    assert "has an invalid signature" in rejection(forged)


def email(text: str) -> x509.RFC822Name:
    """Return an unvalidated address, as in a hostile CSR."""
    return x509.RFC822Name._init_without_validation(text)


OTHER_NAMES: dict[str, tuple[x509.GeneralName, str]] = {
    "IP network": (x509.IPAddress(ip_network("10.0.0.0/8")), "is not an IP address"),
    "IPv4-mapped IPv6 address": (x509.IPAddress(ip_address("::ffff:10.0.0.1")), "use 10.0.0.1"),
    "email without a domain": (email("root"), "is not an email address"),
    "email with two": (email("root@a.example@b.example"), "has a domain that has the label"),
    "email with NUL": (email("root@a.example\x00.b.example"), r"has the label 'example\x00'"),
    "email with newline": (email("root\n@a.example"), "is not an email address"),
    "email with a quoted part": (email('"a b"@a.example'), "is not an email address"),
    "directory": (x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])), "DirectoryName"),
    "registered id": (x509.RegisteredID(ObjectIdentifier("1.2.3")), "RegisteredID"),
    "other name": (x509.OtherName(ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x01x"), "OtherName"),
    "bad DNS name": (x509.DNSName("a_b.example"), "has the label 'a_b'"),
    "DNS name with NUL": (x509.DNSName("a.example\x00.b.example"), r"has the label 'example\x00'"),
    "DNS name with newline": (x509.DNSName("a\n.example"), r"has the label 'a\n'"),
    "empty DNS name": (x509.DNSName(""), "is empty"),
    "top-level wildcard": (x509.DNSName("*.com"), "top-level"),
    "bad URI": (x509.UniformResourceIdentifier("urn:x"), "is not a URI of the form"),
    "bad SPIFFE ID": (x509.UniformResourceIdentifier("spiffe://td/a//b"), "is not a SPIFFE ID"),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_unsupported_or_invalid_name_is_rejected(name: str) -> None:
    general_name, words = OTHER_NAMES[name]
    assert words in rejection(csr_with(x509.DNSName("good.example"), general_name))


# A subject alternative name with an x400Address ([3]), which cryptography does not support (RFC 5280 section 4.2.1.6).
X400 = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), b"\x30\x02\xa3\x00")


@pytest.mark.parametrize(
    "extension",
    [
        X400,
        x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), b"\xff"),
        x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.30"), b"\xff"),
        x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.19"), b""),
    ],
)
def test_invalid_extension_is_rejected(extension: x509.ExtensionType) -> None:
    assert "has invalid extensions" in rejection(csr_with(extensions=(extension,)))


def test_subject_and_other_extensions_are_ignored() -> None:
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("A.Example")]), critical=False)
    )
    request = parse_csr(builder.sign(key_of(KeyType.EC_P256), SHA256()).public_bytes(Encoding.DER))
    assert isinstance(request, ParsedCSR)
    assert request.names == names("a.example")


def test_number_of_names_is_limited() -> None:
    many = [x509.DNSName(f"n{number}.example") for number in range(MAX_NAMES + 1)]
    assert f"at most {MAX_NAMES}" in rejection(csr_with(*many))
    assert len(parse_csr(csr_with(*many[1:])).names) == MAX_NAMES


def signed(to_be_signed: bytes) -> bytes:
    key = key_of(KeyType.EC_P256)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return hostile_csrs.signed(to_be_signed, key)


def contains(der: bytes, name: Name) -> bool:
    """Return whether the CSR contains the bytes of the name, regardless of its structure."""
    wanted = name.address.packed if isinstance(name, IPAddress) else name.text.lower().encode()
    return wanted in (der if isinstance(name, IPAddress) else der.lower())


FUZZED = names("www.example.com", "*.example.com", "https://example.com/a", "10.0.0.1", "fd00::1", "a.b@example.com")
TO_BE_SIGNED = x509.load_der_x509_csr(build_csr(key_of(KeyType.EC_P256), FUZZED)).tbs_certrequest_bytes
SAN_STARTS = TO_BE_SIGNED.index(b"\x55\x1d\x11")  # the start of the alternative names


def test_signed_returns_a_valid_csr() -> None:
    assert parse_csr(signed(TO_BE_SIGNED)).names == FUZZED


edits = st.lists(
    st.tuples(
        st.one_of(st.integers(SAN_STARTS, len(TO_BE_SIGNED) - 1), st.integers(0, len(TO_BE_SIGNED) - 1)),
        st.one_of(
            st.sampled_from([b"", *(bytes([one]) for one in b"\x00*.@%\x30\x80\x82\x86\x87\xff")]),
            st.binary(max_size=3),
        ),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=10 * settings().max_examples)
@given(edits)
def test_edited_csr_with_valid_signature_has_no_other_names(changes: list[tuple[int, bytes, int]]) -> None:
    content = TO_BE_SIGNED
    for position, new, taken in changes:
        content = content[:position] + new + content[position + taken :]
    der = signed(content)
    request = outcome(lambda: parse_csr(der), CertmountError)
    if isinstance(request, CertmountError):
        assert request.reason is Reason.INVALID_CSR
        assert str(request).isprintable()
        event("rejected")
    else:
        assert all(contains(der, name) for name in request.names)
        assert len(request.names) <= MAX_NAMES
        event("accepted")


general_names = st.builds(
    der_value,
    st.sampled_from([0x81, 0x82, 0x86, 0x87, 0xA0, 0xA3, 0xA4, 0x88, 0x30]),
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from(
            [b"a.example", b"A.Example", b"a@b.example", b"https://a.example/x", bytes(4), bytes(16), bytes(8)]
        ),
    ),
)


@settings(max_examples=4 * settings().max_examples)
@given(st.lists(general_names, max_size=4))
def test_arbitrary_alternative_names_are_valid_or_rejected(wanted: list[bytes]) -> None:
    extension = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), der_value(0x30, *wanted))
    der = csr_with(extensions=(extension,))
    request = outcome(lambda: parse_csr(der), CertmountError)
    if isinstance(request, ParsedCSR):
        assert len(request.names) <= len(wanted)
        assert all(contains(der, name) for name in request.names)
        assert parse_csr(build_csr(key_of(KeyType.EC_P256), request.names)).names == request.names
    else:
        assert request.reason is Reason.INVALID_CSR


@pytest.mark.timeout(20)
@pytest.mark.parametrize("tag", [0x30, 0x31, 0xA0, 0xA3, 0xA4], ids=lambda tag: f"{tag:#x}")
def test_deeply_nested_and_wide_csr_is_rejected_quickly(tag: int) -> None:
    nested = b""
    while len(nested) < MAX_CSR_BYTES - 1000:
        nested = der_value(tag, nested)
    wide = der_value(tag, b"\x82\x00" * 30_000)
    for hostile in (nested, wide, nested[:1000] * 60):
        extension = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), hostile)
        for der in (hostile, signed(hostile), csr_with(extensions=(extension,))):
            assert "certificate signing request" in rejection(der)
