"""Hostile CSRs and certificates are rejected before they are parsed; everything that certmount issues fits."""

from __future__ import annotations

import base64
import contextlib
import functools
import time
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.der_bounds import NotDER, OutOfBounds, check_certificate, csr_key_type
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.spec import MAX_NAMES, KeyType
from tests.support import hostile_csrs
from tests.support.hostile_csrs import CRL, HOSTILE, RDN, SPKI, der_value, extension, names, with_rsa_key
from tests.unit.core import pki
from tests.unit.core.outcomes import outcome

_LONGEST_S = 0.05  # a hundred times what the checks need, and half of what the parser needs


def quickest_s(check: Callable[[], object]) -> float:
    """Return the shortest time of three, because another process can use the CPU."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        outcome(check, CertmountError)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_csr_is_rejected_before_it_is_parsed(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = HOSTILE[attack]
    der = make()
    monkeypatch.setattr(x509, "load_der_x509_csr", lambda _: pytest.fail("parsed"))
    with pytest.raises(CertmountError, match=r"^InvalidCSR: ") as failure:
        parse_csr(der)
    assert str(failure.value).startswith("InvalidCSR: certificate signing request: has ")
    assert words in str(failure.value)
    assert quickest_s(lambda: parse_csr(der)) < _LONGEST_S


@pytest.mark.parametrize("kind", KeyType)
def test_largest_csr_of_each_key_type_is_accepted(kind: KeyType) -> None:
    largest = pki.names(*pki.LARGEST_DNS, *pki.LARGEST_URIS)
    assert len(largest) == MAX_NAMES
    try:
        key = pki.key_of(kind)
    except UnsupportedAlgorithm as error:
        pytest.skip(f"the OpenSSL of this machine does not support {kind.value}: {error}")
    der = build_csr(key, largest)
    assert (csr_key_type(der), parse_csr(der).names) == (kind, largest)
    assert quickest_s(lambda: parse_csr(der)) < _LONGEST_S


def test_compressed_points_are_accepted() -> None:
    key = load_der_public_key(SPKI)
    point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    compressed = der_value(0x30, SPKI[2:23], der_value(0x03, b"\x00", point))
    assert parse_csr(hostile_csrs.signed(hostile_csrs.content(key=compressed))).key_type is KeyType.EC_P256


def certificate(key: bytes = SPKI, name: bytes = b"0\0", extensions: bytes = b"", serial: bytes = b"\x01") -> bytes:
    """Return a certificate with a made-up signature."""
    algorithm, validity = PARTS
    fields = algorithm, name, validity, name, key, extensions
    body = der_value(0x30, b"\xa0\x03\x02\x01\x02", der_value(0x02, serial), *fields)
    return der_value(0x30, body, algorithm, der_value(0x03, bytes(65)))


PARTS = bytes.fromhex("300a06082a8648ce3d040302"), der_value(0x30, *[der_value(0x17, b"260101000000Z")] * 2)
LONG_NAME = der_value(0x30, *[RDN] * 2000)


def extended(*each: bytes) -> bytes:
    return certificate(extensions=der_value(0xA3, der_value(0x30, *each)))


def rsa_key_of(request: bytes) -> bytes:
    return x509.load_der_x509_csr(request).tbs_certrequest_bytes[9:-2]


def with_key_type(identifier: str) -> bytes:
    return certificate(der_value(0x30, der_value(0x30, bytes.fromhex(identifier)), b"\x03\x01\0"))


def with_algorithm(identifier: bytes) -> bytes:
    """Return a certificate with a long RSA exponent. The parser accepts an identifier without parameters, and RSASSA-PSS."""
    key = rsa_key_of(with_rsa_key(3072, (1 << 3070) + 1))
    usual = bytes.fromhex("300d06092a864886f70d0101010500")
    return certificate(der_value(0x30, identifier, key[key.index(usual) + len(usual) :]))


CERTIFICATES: dict[str, tuple[Callable[[], bytes], str]] = {
    "12,000 names": (lambda: extended(names(*[b"\x86\x03a:b"] * 12_000)), "has more than 200 names; use at most 100"),
    "a directory name": (lambda: extended(names(der_value(0xA4, LONG_NAME))), "has a name that is a DirectoryName"),
    "5,000 distribution points": (
        lambda: extended(extension(CRL, der_value(0x30, *[b"\x30\x07\xa0\x05\xa0\x03\x86\x01a"] * 5000))),
        "bytes of extensions other than names; use at most 8192",
    ),
    "5,000 extensions": (lambda: extended(*[extension(CRL, b"")] * 5000), "has more than 32 extensions"),
    "2,000 subject parts": (lambda: certificate(name=LONG_NAME), "has a subject or issuer of more than 2048 bytes"),
    "a large RSA key": (lambda: certificate(rsa_key_of(with_rsa_key(16_384))), "has an RSA key with a modulus of more"),
    "a long RSA exponent": (
        lambda: certificate(rsa_key_of(with_rsa_key(3072, (1 << 3070) + 1))),
        "or an exponent of more than 32 bits",
    ),
    **{
        f"a long RSA exponent in a key with the algorithm identifier {algorithm}": (
            functools.partial(with_algorithm, bytes.fromhex(algorithm)),
            "or an exponent of more than 32 bits",
        )
        for algorithm in ("300b06092a864886f70d010101", "300b06092a864886f70d01010a")
    },
    "a DSA key": (lambda: with_key_type("06072a8648ce380401"), "has an unsupported key of the type DSA or DH"),
    "a DH key": (lambda: with_key_type("06072a8648ce3e0201"), "has an unsupported key of the type DSA or DH"),
}


@pytest.mark.parametrize("attack", CERTIFICATES)
def test_hostile_certificate_is_rejected_before_it_is_parsed(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = CERTIFICATES[attack]
    der = make()
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    with pytest.raises(ValueError, match="not certificates in PEM"):
        decode_certificates(pem)
    monkeypatch.setattr(x509, "load_der_x509_certificate", lambda _: pytest.fail("parsed"))
    with pytest.raises(CertmountError) as failure:
        parse_certificates([der], "chain")
    assert str(failure.value).startswith("InvalidResponse: certificate from the authority: chain: a certificate has ")
    assert words in str(failure.value)
    assert quickest_s(lambda: parse_certificates([der], "chain")) < _LONGEST_S


def test_made_up_certificate_is_otherwise_accepted() -> None:
    check_certificate(extended(names(b"\x82\x01a")))
    check_certificate(certificate(rsa_key_of(with_rsa_key(4096))))
    parse_certificates([extended(names(b"\x82\x01a"))], "chain")


@given(st.binary(max_size=200), st.sampled_from(["", "30", "3080", "3084ffffffff", "30820100", "3082010030820050"]))
@example(b"", "30ff")
@example(b"\x30" * 10_000, "")
def test_any_bytes_are_read_in_bounded_time(tail: bytes, start: str) -> None:
    der = bytes.fromhex(start) + tail
    for check in (csr_key_type, check_certificate):
        with contextlib.suppress(NotDER, OutOfBounds):
            check(der)


def test_cut_csr_is_not_der() -> None:
    der = hostile_csrs.with_extensions(names(b"\x82\x01a"))
    for length in range(len(der) - 80):
        with pytest.raises((NotDER, OutOfBounds)):
            csr_key_type(der[:length])
