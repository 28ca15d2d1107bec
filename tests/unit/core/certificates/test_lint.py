"""A certificate with a wrong part, or with other content than granted, must not leave the authority."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.certificates.csr import san_extension
from csi_driver.core.certificates.keys import generate_key, public_bytes
from csi_driver.core.certificates.lint import GrantedCertificate, lint
from csi_driver.core.names import Names
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.spec import KeyType, Usage
from tests.unit.core import pki, strategies

KEY, SIGNER = generate_key(KeyType.EC_P256), ec.generate_private_key(ec.SECP256R1())
NAMES = pki.names("a.example.com", "spiffe://cluster.local/ns/web/sa/a", "10.0.0.1", "a@example.com")
GRANTED = GrantedCertificate(public_bytes(KEY.public_key()), Names.of(NAMES.dns), NAMES, ALL_USAGES, 3660)
PURPOSES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
SUBJECT = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a.example.com")])
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\x00")
Extensions = dict[str, tuple[x509.ExtensionType, bool]]


def extensions(names: Names = NAMES) -> Extensions:
    return {
        "constraints": (x509.BasicConstraints(ca=False, path_length=None), True),
        "usage": (pki.key_usage("digital_signature"), True),
        "purposes": (x509.ExtendedKeyUsage(PURPOSES), False),
        "issuer": (x509.AuthorityKeyIdentifier.from_issuer_public_key(SIGNER.public_key()), False),
        "names": (san_extension(names), False),
        "key": (x509.SubjectKeyIdentifier.from_public_key(KEY.public_key()), False),
    }


def build(
    changes: Extensions | None = None,
    key: ec.EllipticCurvePublicKey | None = None,
    lifetime: timedelta = timedelta(hours=1),
    subject: x509.Name = SUBJECT,
    names: Names = NAMES,
) -> bytes:
    builder = (
        x509.CertificateBuilder(x509.Name([]), subject, key or KEY.public_key(), x509.random_serial_number())
        .not_valid_before(pki.NOW - timedelta(minutes=1))
        .not_valid_after(pki.NOW + lifetime)
    )
    for value, critical in {**extensions(names), **(changes or {})}.values():
        builder = builder.add_extension(value, critical=critical)
    return builder.sign(SIGNER, SHA256()).public_bytes(Encoding.DER)


def problems(der: bytes, granted: GrantedCertificate = GRANTED) -> list[str]:
    return lint(der, granted)[1]


def test_fields_are_those_of_the_certificate() -> None:
    der = build()
    leaf, found = lint(der, GRANTED)
    certificate = x509.load_der_x509_certificate(der)
    assert found == []
    assert leaf is not None
    assert leaf.serial_hex == f"{certificate.serial_number:x}"
    assert leaf.not_after_text == f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"


def patched(old: str, new: str) -> bytes:
    der = build()
    assert der.count(bytes.fromhex(old)) >= 1
    return der.replace(bytes.fromhex(old), bytes.fromhex(new), 1)


def with_serial(serial: bytes) -> bytes:
    """Replace a serial number of the same length."""
    der = build()
    number = x509.load_der_x509_certificate(der).serial_number
    content = number.to_bytes(number.bit_length() // 8 + 1)
    return der.replace(content, serial.rjust(len(content), b"\0")[: len(content)], 1)


def with_ca_usage(bit: str) -> bytes:
    return build({"usage": (pki.key_usage("digital_signature", bit), True)})


PROMISES: dict[str, Callable[[], bytes]] = {
    "is not of version 3 (RFC 5280 section 4.1.2.1)": lambda: patched("a003020102", "a003020101"),
    "has a serial number that is not positive, or longer than 20 octets (section 4.1.2.2)": lambda: with_serial(b""),
    "names two signature algorithms (section 4.1.1.2)": lambda: patched("06082a8648ce3d040302", "06082a8648ce3d040303"),
    "expires before it is valid (section 4.1.2.5)": lambda: build().replace(b"261122095900Z", b"271122095900Z"),
    "is valid for longer than granted": lambda: build(lifetime=timedelta(hours=1, seconds=1)),
    "has a critical extension that is unknown (section 4.2)": lambda: build({"x": (UNKNOWN, True)}),
    "is a CA certificate (section 4.2.1.9)": lambda: build({"constraints": (x509.BasicConstraints(True, 0), True)}),
    "can sign certificates or CRLs (section 4.2.1.3)": lambda: with_ca_usage("key_cert_sign"),
    "has no subject, and names that are not critical (section 4.2.1.6)": lambda: build(subject=x509.Name([])),
    "is for another key": lambda: build(key=ec.generate_private_key(ec.SECP256R1()).public_key()),
    "has other names than granted": lambda: build(names=pki.names("a.example.com", "b.example.com")),
    "has other extensions than those of certmount": lambda: build({"x": (UNKNOWN, False)}),
    "has other usages than granted (section 4.2.1.12)": lambda: build({"purposes": (x509.ExtendedKeyUsage(PURPOSES[:1]), False)}),
    "is not an X.509 certificate in DER": lambda: build()[:-1],
}  # fmt: skip


@pytest.mark.parametrize("problem", PROMISES)
def test_each_promise_is_checked(problem: str) -> None:
    assert problem in problems(PROMISES[problem]())


def test_other_faults_are_found() -> None:
    twice = build({"x": (x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.99"), b"\x04\x00"), False)})
    twice = twice.replace(bytes.fromhex("0603551d63"), bytes.fromhex("0603551d0e"))
    assert "has an extension twice (section 4.2)" in problems(twice)
    assert problems(with_serial(b"\xff" * 20))
    assert problems(with_ca_usage("crl_sign")) == ["can sign certificates or CRLs (section 4.2.1.3)"]
    both = build({"constraints": (x509.BasicConstraints(True, 0), True), "x": (UNKNOWN, True)})
    assert len(problems(both)) == 3


def test_certificate_lacks_a_requested_name() -> None:
    assert problems(build(names=Names.of(NAMES.dns, NAMES.uris))) == []  # only names that the policy added are missing
    assert problems(build(names=Names.of([], NAMES.uris))) == ["has other names than granted"]


def test_other_issuers_can_add_extensions_usages_and_lifetime() -> None:
    other = replace(GRANTED, usages=None, lifetime_s=None)
    upper = Names.of(pki.names("a.example.com").dns)
    der = build(
        {"x": (UNKNOWN, False), "purposes": (x509.ExtendedKeyUsage(PURPOSES[:1]), False)},
        None,
        timedelta(90),
        names=upper,
    )
    assert problems(der, other) == []
    assert problems(der.replace(b"\x82\x0da.example.com", b"\x82\x0dA.EXAMPLE.COM"), other) == []
    assert problems(build({"x": (UNKNOWN, True)}), other) == ["has a critical extension that is unknown (section 4.2)"]


texts = st.one_of(strategies.dns_texts, strategies.uri_texts, strategies.ip_texts, strategies.email_texts)


@given(st.lists(texts, min_size=1, max_size=8).map(lambda found: pki.names(*found)))
def test_any_granted_names_are_accepted(names: Names) -> None:
    assert problems(build(names=names), replace(GRANTED, requested=names, allowed=names)) == []
    if len(names) > 1:
        fewer = Names.of(names.dns[1:], names.uris, names.ips, names.emails) if names.dns else Names()
        assert problems(build(names=names), replace(GRANTED, requested=Names(), allowed=fewer)) != []


@given(st.binary(max_size=60), st.integers(0, 500), st.integers(0, 20))
def test_damaged_certificates_raise_nothing(junk: bytes, where: int, length: int) -> None:
    der = build()
    problems(der[:where] + junk + der[where + length :])
    problems(junk)


def test_empty_usages_are_not_granted() -> None:
    granted = replace(GRANTED, usages=(Usage.SERVER,))
    assert problems(build(), granted) == ["has other usages than granted (section 4.2.1.12)"]
