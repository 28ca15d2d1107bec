"""Bounds of CSRs, certificates and private keys, checked before cryptography parses them: sizes, counts and key types.

The functions read at most 500 DER elements, whatever the input, which takes about 0.3 ms. The parser needs up to 90 ms for some
inputs of 64 KiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from csi_driver.core.names import internationalized_problem
from csi_driver.core.spec import MAX_NAMES, KeyType

MAX_SUBJECT_BYTES = 2048
MAX_OTHER_EXTENSION_BYTES = 8192
"""All extensions except the names. The roots of some CAs have dozens of name constraints."""
_MAX_EXTENSIONS = 32
_MAX_ELEMENTS = 500
_MAX_RSA_BYTES = 1 + 8192 // 8
_MAX_RSA_EXPONENT_BYTES = 5  # OpenSSL needs milliseconds for a long exponent

# The algorithm identifiers (RFC 3279, RFC 5480, RFC 8410, RFC 9881), and the sizes of a SubjectPublicKeyInfo. Elliptic curves
# have a second size for compressed points. Explicit curve parameters are another identifier.
_RSA = bytes.fromhex("300d06092a864886f70d0101010500")
_KEY_TYPES: dict[bytes, dict[int, KeyType]] = {
    bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"): {91: KeyType.EC_P256, 59: KeyType.EC_P256},
    bytes.fromhex("301006072a8648ce3d020106052b81040022"): {120: KeyType.EC_P384, 72: KeyType.EC_P384},
    bytes.fromhex("301006072a8648ce3d020106052b81040023"): {158: KeyType.EC_P521, 90: KeyType.EC_P521},
    _RSA: {294: KeyType.RSA_2048, 422: KeyType.RSA_3072, 550: KeyType.RSA_4096},
    bytes.fromhex("300506032b6570"): {44: KeyType.ED25519},
    bytes.fromhex("300b0609608648016503040311"): {1334: KeyType.ML_DSA_44},
    bytes.fromhex("300b0609608648016503040312"): {1974: KeyType.ML_DSA_65},
    bytes.fromhex("300b0609608648016503040313"): {2614: KeyType.ML_DSA_87},
}
_DSA_OR_DH = bytes.fromhex("06072a8648ce380401"), bytes.fromhex("06072a8648ce3e0201")
_RSA_IDENTIFIERS = bytes.fromhex("06092a864886f70d010101"), bytes.fromhex("06092a864886f70d01010a")  # also RSASSA-PSS
_RSA_65537 = b"\x02\x03\x01\x00\x01"
_EXTENSION_REQUESTS = (
    bytes.fromhex("06092a864886f70d01090e"),  # PKCS#9 (RFC 2985 section 5.4.2)
    bytes.fromhex("060a2b06010401823702010e"),  # Microsoft's
)
_SUBJECT_ALTERNATIVE_NAME = bytes.fromhex("0603551d11")
_VERSION, _EXTENSIONS, _DIRECTORY_NAME, _SET = 0xA0, 0xA3, 0xA4, 0x31
_WRONG_NAME = "has a name that is a DirectoryName; use DNS names, URIs, IP addresses and email addresses"


class NotDER(ValueError):
    """The input is not a CSR or certificate in DER."""


class OutOfBounds(ValueError):
    """The input must not be parsed. The text follows the input's name, as in "has too many extensions"."""


class UnsupportedKeyType(OutOfBounds):
    """The input has a key of a type that certmount does not sign."""


class DERElement(NamedTuple):
    """An element, with and without its tag and length."""

    tag: int
    encoded: bytes
    content: bytes


class DERReader:
    """Reads DER elements, and at most ``_MAX_ELEMENTS`` of them."""

    def __init__(self) -> None:
        self._left = _MAX_ELEMENTS

    def elements(self, data: bytes) -> Iterator[DERElement]:
        """Yield the elements of the content of a SEQUENCE or SET; raises NotDER for the first that is damaged."""
        position, size = 0, len(data)
        while position < size:
            self._left -= 1
            if self._left < 0:
                raise OutOfBounds(f"has more than {_MAX_ELEMENTS} elements")
            start = position + 2
            length = data[position + 1] if start <= size else size
            if length >= 0x80:  # the number of bytes of the length
                start, length = start + length - 0x80, int.from_bytes(data[start : start + length - 0x80])
            end = start + length
            if end > size:
                raise NotDER
            yield DERElement(data[position], data[position:end], data[start:end])
            position = end

    def first(self, data: bytes) -> DERElement:
        for element in self.elements(data):
            return element
        raise NotDER

    def signed_part(self, der: bytes) -> list[DERElement]:
        return list(self.elements(self.first(self.first(der).content).content))


def csr_key_type(der: bytes) -> KeyType:
    """Return the key type in a CSR that can be parsed; raises NotDER, or OutOfBounds if parsing it takes too long."""
    read = DERReader()
    body = read.signed_part(der)
    if len(body) != 4:
        raise NotDER
    _, subject, key, attributes = body
    _check_distinguished_names(subject)
    key_type = _key_type(read, key)
    try:
        _check_extensions(read, _requested_extensions(read, attributes), MAX_NAMES)
    except NotDER:
        raise OutOfBounds("has invalid extensions (not DER)") from None
    return key_type


def check_certificate(der: bytes) -> None:
    """Raise OutOfBounds if parsing and verifying a certificate takes too long, or NotDER."""
    read = DERReader()
    body = [each for each in read.signed_part(der) if each.tag != _VERSION]
    if len(body) < 6:
        raise NotDER
    _, _, issuer, _, subject, key, *optional = body
    _check_distinguished_names(issuer, subject)
    _check_public_key(read, key)
    for each in optional:
        if each.tag == _EXTENSIONS:
            # The issuer can add names to the requested ones.
            _check_extensions(read, read.elements(read.first(each.content).content), 2 * MAX_NAMES)


def check_private_key(der: bytes) -> None:
    """Raise UnsupportedKeyType if parsing an unencrypted private key could take hours, as a long DSA key does, or NotDER.

    Of PKCS#8, PKCS#1 and SEC1, only PKCS#8 contains a SEQUENCE, which is the algorithm identifier.
    """
    read = DERReader()
    if any(each.tag == 0x30 and each.encoded not in _KEY_TYPES for each in read.elements(read.first(der).content)):
        raise UnsupportedKeyType("has an unsupported type")


def _check_distinguished_names(*names: DERElement) -> None:
    if any(len(name.encoded) > MAX_SUBJECT_BYTES for name in names):
        raise OutOfBounds(f"has a subject or issuer of more than {MAX_SUBJECT_BYTES} bytes")


def _key_type(read: DERReader, key: DERElement) -> KeyType:
    algorithm = read.first(key.content).encoded
    key_type = _KEY_TYPES.get(algorithm, {}).get(len(key.encoded))
    if key_type is None or (algorithm == _RSA and not key.content.endswith(_RSA_65537)):
        raise UnsupportedKeyType("has an unsupported key type; use one of " + ", ".join(kind.value for kind in KeyType))
    return key_type


def _check_public_key(read: DERReader, key: DERElement) -> None:
    algorithm, bits, *_ = (*read.elements(key.content), key, key)
    if algorithm.content.startswith(_DSA_OR_DH):
        # OpenSSL needs up to 0.4 s to load one, or to verify its signatures.
        raise OutOfBounds("has an unsupported key of the type DSA or DH")
    if not algorithm.content.startswith(_RSA_IDENTIFIERS):  # with any parameters
        return
    # The first byte of the BIT STRING is the number of unused bits. A SEQUENCE of modulus and exponent follows.
    modulus, exponent, *_ = (*read.elements(read.first(bits.content[1:]).content), key, key)
    if len(modulus.content) > _MAX_RSA_BYTES or len(exponent.content) > _MAX_RSA_EXPONENT_BYTES:
        raise OutOfBounds("has an RSA key with a modulus of more than 8192 bits or an exponent of more than 32 bits")


def _requested_extensions(read: DERReader, attributes: DERElement) -> Iterator[DERElement]:
    """Yield the extensions in the attributes of a CSR. The parser does not read the other attributes.

    Programs differ in which of several requests they read, so the authority and a signer could see different names.
    """
    requests = [each for each in read.elements(attributes.content) if each.content.startswith(_EXTENSION_REQUESTS)]
    if len(requests) > 1:
        raise OutOfBounds("has more than one request for extensions")
    for request in requests:
        for value in read.elements(request.content):
            for extensions in read.elements(value.content) if value.tag == _SET else ():
                yield from read.elements(extensions.content)


def _check_extensions(read: DERReader, extensions: Iterable[DERElement], max_names: int) -> None:
    other_bytes = 0
    names: list[str] = []
    for number, extension in enumerate(extensions, start=1):
        if number > _MAX_EXTENSIONS:
            raise OutOfBounds(f"has more than {_MAX_EXTENSIONS} extensions")
        if not extension.content.startswith(_SUBJECT_ALTERNATIVE_NAME):
            other_bytes += len(extension.encoded)
            continue
        for name in read.elements(read.first(_value(read, extension)).content):
            names.append(name.content.decode("latin-1"))
            if len(names) > max_names:
                raise OutOfBounds(f"has more than {max_names} names; use at most {MAX_NAMES}")
            if name.tag == _DIRECTORY_NAME:
                raise OutOfBounds(_WRONG_NAME)
    if too_many := internationalized_problem(names):
        raise OutOfBounds(f"{too_many}; use fewer names")
    if other_bytes > MAX_OTHER_EXTENSION_BYTES:
        raise OutOfBounds(
            f"has {other_bytes} bytes of extensions other than names; use at most {MAX_OTHER_EXTENSION_BYTES}"
        )


def _value(read: DERReader, extension: DERElement) -> bytes:
    """Return the content of an extension's OCTET STRING."""
    *_, value = read.elements(extension.content)
    return value.content
