"""CSRs with a valid signature that take long to parse or to verify: made by a compromised node."""

from __future__ import annotations

import random
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

KEY = ec.generate_private_key(ec.SECP256R1())
SPKI = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
RSA_WITH_SHA256 = bytes.fromhex("300d06092a864886f70d01010b0500")
EXTENSION_REQUEST = bytes.fromhex("06092a864886f70d01090e")
MICROSOFT_EXTENSION_REQUEST = bytes.fromhex("060a2b06010401823702010e")
SAN, EKU, POLICIES, CONSTRAINTS, CRL = (bytes.fromhex(f"0603551d{last}") for last in ("11", "25", "20", "1e", "1f"))
OID = b"\x06\x03\x2a\x03\x04"
RDN = bytes.fromhex("310a3008060355040a0c0161")


def der_value(tag: int, *contents: bytes) -> bytes:
    """Encode tag, length and content (X.690 section 8.1)."""
    content = b"".join(contents)
    if len(content) < 0x80:
        return bytes([tag, len(content)]) + content
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def signed(to_be_signed: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    """Return a CSR with any content and a valid signature."""
    signature = key.sign(to_be_signed, ec.ECDSA(SHA256()))
    return der_value(0x30, to_be_signed, ECDSA_WITH_SHA256, der_value(0x03, b"\x00", signature))


def content(subject: bytes = b"\x30\x00", key: bytes = SPKI, attributes: bytes = b"") -> bytes:
    return der_value(0x30, b"\x02\x01\x00", subject, key, der_value(0xA0, attributes))


def with_extensions(*extensions: bytes, request: bytes = EXTENSION_REQUEST) -> bytes:
    return signed(content(attributes=der_value(0x30, request, der_value(0x31, der_value(0x30, *extensions)))))


def extension(oid: bytes, value: bytes) -> bytes:
    return der_value(0x30, oid, der_value(0x04, value))


def names(*each: bytes) -> bytes:
    return extension(SAN, der_value(0x30, *each))


def internationalized_names(count: int) -> list[str]:
    """Return long names with valid labels that take long to decode, each label once."""
    letters = [chr(number) for number in range(0x4E00, 0x4E00 + count * 4 * 15)]
    labels = ["xn--" + "".join(letters[start :: count * 4]).encode("punycode").decode() for start in range(count * 4)]
    return [f"{'.'.join(labels[start::count])}.example" for start in range(count)]


def with_rsa_key(bits: int, exponent: int = 65537) -> bytes:
    """Return a CSR with a made-up RSA key and signature."""
    rng = random.Random(bits)  # noqa: S311  # not a secret

    def integer(value: int) -> bytes:
        return der_value(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))

    numbers = der_value(0x30, integer(rng.getrandbits(bits) | 1 << bits - 1 | 1), integer(exponent))
    key = der_value(0x30, bytes.fromhex("300d06092a864886f70d0101010500"), der_value(0x03, b"\x00", numbers))
    signature = der_value(0x03, b"\x00", rng.getrandbits(bits - 1).to_bytes((bits + 7) // 8, "big"))
    return der_value(0x30, content(key=key), RSA_WITH_SHA256, signature)


def with_explicit_curve() -> bytes:
    """Return a CSR whose key has explicit curve parameters (X9.62) in place of a curve's name."""
    field = der_value(0x30, bytes.fromhex("06072a8648ce3d0101"), der_value(0x02, b"\x00" + b"\xff" * 4000))
    parameters = der_value(0x30, b"\x02\x01\x01", field, der_value(0x30, b"\x04\x01\x01", b"\x04\x01\x01"))
    algorithm = der_value(0x30, bytes.fromhex("06072a8648ce3d0201"), parameters)
    return signed(content(key=der_value(0x30, algorithm, der_value(0x03, b"\x00\x04" + bytes(64)))))


KEY_TYPE = "has an unsupported key type; use one of EC-P256, EC-P384, EC-P521, RSA-2048"
OTHER_BYTES = "bytes of extensions other than names; use at most 8192"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "12,000 names": (lambda: with_extensions(names(*[b"\x86\x03a:b"] * 12_000)), "has more than 100 names"),
    "12,000 names in Microsoft's attribute": (
        lambda: with_extensions(names(*[b"\x86\x03a:b"] * 12_000), request=MICROSOFT_EXTENSION_REQUEST),
        "has more than 100 names",
    ),
    "names in two extensions": (lambda: with_extensions(*[names(*[b"\x82\x01a"] * 60)] * 2), "has more than 100 names"),
    "a name with 5,000 parts": (
        lambda: with_extensions(names(der_value(0xA4, der_value(0x30, *[RDN] * 5000)))),
        "has a name that is a DirectoryName",
    ),
    "60 names of internationalized labels": (
        lambda: with_extensions(names(*[der_value(0x82, name.encode()) for name in internationalized_names(60)])),
        "has more than 4096 characters of different xn-- labels",
    ),
    "12,000 usages": (lambda: with_extensions(extension(EKU, der_value(0x30, *[OID] * 12_000))), OTHER_BYTES),
    "8,000 policies": (
        lambda: with_extensions(extension(POLICIES, der_value(0x30, *[der_value(0x30, OID)] * 8000))),
        OTHER_BYTES,
    ),
    "12,000 name constraints": (
        lambda: with_extensions(
            extension(CONSTRAINTS, der_value(0x30, der_value(0xA0, *[b"\x30\x03\x82\x01a"] * 12_000)))
        ),
        OTHER_BYTES,
    ),
    "5,000 extensions": (lambda: with_extensions(*[extension(OID, b"")] * 5000), "has more than 32 extensions"),
    "4,500 attributes": (
        lambda: signed(content(attributes=der_value(0x30, OID, der_value(0x31, b"\x05\x00")) * 4500)),
        "has more than 500 elements",
    ),
    "4,500 attributes with extensions": (
        lambda: signed(content(attributes=der_value(0x30, EXTENSION_REQUEST, b"\x31\x02\x30\x00") * 3500)),
        "has more than 500 elements",
    ),
    "a subject with 5,000 parts": (
        lambda: signed(content(subject=der_value(0x30, *[RDN] * 5000))),
        "has a subject or issuer of more than 2048 bytes",
    ),
    "an RSA key of 4,088 bits": (lambda: with_rsa_key(4088), KEY_TYPE),
    "an RSA key of 16,384 bits": (lambda: with_rsa_key(16_384), KEY_TYPE),
    "a long RSA exponent": (lambda: with_rsa_key(3072, (1 << 3070) + 1), KEY_TYPE),
    "an explicit curve": (with_explicit_curve, KEY_TYPE),
}
