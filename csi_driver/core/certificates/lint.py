"""Check a certificate before it leaves the authority: RFC 5280, and that it has the requested key and the granted names.

It reads the DER itself. So it shares no code with what builds certificates, and takes about 20 microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from cryptography import x509

from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.parsing import PARSE_ERRORS
from csi_driver.core.names import Names
from csi_driver.core.spec import Usage

_MAX_BYTES = 64 * 1024
_MAX_ELEMENTS = 500
_MAX_SERIAL_BYTES = 20
_SHARED_BYTES = 64  # the longest extension that is remembered
_VERSION_3 = b"\x02\x01\x02"
_TRUE = b"\xff"
_VERSION, _EXTENSIONS, _UTC_TIME, _GENERALIZED_TIME = 0xA0, 0xA3, 0x17, 0x18
_EMAIL, _DNS, _URI, _IP = 0x81, 0x82, 0x86, 0x87  # the tags of a GeneralName
# The last byte of the OIDs below id-ce (section 4.2.1).
_KEY_IDENTIFIER, _KEY_USAGE, _NAMES, _CONSTRAINTS, _POLICIES, _ISSUER_IDENTIFIER, _USAGES = (
    bytes((0x55, 0x1D, number)) for number in (14, 15, 17, 19, 32, 35, 37)
)
_KNOWN = {_KEY_IDENTIFIER, _KEY_USAGE, _NAMES, _CONSTRAINTS, _POLICIES, _ISSUER_IDENTIFIER, _USAGES}
_OWN = {_KEY_IDENTIFIER, _KEY_USAGE, _NAMES, _CONSTRAINTS, _ISSUER_IDENTIFIER, _USAGES}  # of the internal CA
_NO_CA = b"\x30\x00"
_PURPOSES = {
    Usage.SERVER: bytes.fromhex("06082b06010505070301"),
    Usage.CLIENT: bytes.fromhex("06082b06010505070302"),
}
_CENTURY_BREAK = 50  # RFC 5280 section 4.1.2.5.1
_SIGNS_CERTIFICATES, _SIGNS_CRLS = 0x04, 0x02  # bits of the first byte of the key usage


@dataclass(frozen=True, slots=True)
class GrantedCertificate:
    """What a certificate must contain. ``key`` is the SubjectPublicKeyInfo (DER) of the request.

    ``usages`` and ``lifetime_s`` are those of a certificate of the internal CA, which contains nothing else. They are
    None for other issuers, which check their own rules.
    """

    key: bytes
    requested: Names
    allowed: Names
    usages: tuple[Usage, ...] | None = None
    lifetime_s: float | None = None


class LeafFields(NamedTuple):
    """The parts of a certificate. The times are numbers such as 20261127140300."""

    der: bytes
    version: bytes
    serial: bytes
    algorithm: bytes
    outer_algorithm: bytes
    not_before: int
    not_after: int
    has_subject: bool
    key: bytes
    extensions: Mapping[bytes, tuple[bool, bytes]]  # whether it is critical, and its value, by OID
    repeated: bool  # whether an extension occurs twice

    @property
    def serial_hex(self) -> str:
        return f"{int.from_bytes(self.serial):x}"

    @property
    def not_after_text(self) -> str:
        text = f"{self.not_after:014}"
        return f"{text[:4]}-{text[4:6]}-{text[6:8]}T{text[8:10]}:{text[10:12]}:{text[12:]}Z"

    def value(self, oid: bytes) -> bytes:
        return self.extensions[oid][1] if oid in self.extensions else b""


_Check = Callable[[LeafFields, GrantedCertificate], bool]
_PROMISES: tuple[tuple[str, _Check], ...] = (
    ("is not of version 3 (RFC 5280 section 4.1.2.1)", lambda leaf, _: leaf.version == _VERSION_3),
    (
        "has a serial number that is not positive, or longer than 20 octets (section 4.1.2.2)",
        lambda leaf, _: _positive(leaf.serial),
    ),
    ("names two signature algorithms (section 4.1.1.2)", lambda leaf, _: leaf.algorithm == leaf.outer_algorithm),
    ("expires before it is valid (section 4.1.2.5)", lambda leaf, _: leaf.not_before < leaf.not_after),
    (
        "is valid for longer than granted",
        lambda leaf, granted: (
            granted.lifetime_s is None or _seconds(leaf.not_after) - _seconds(leaf.not_before) <= granted.lifetime_s
        ),
    ),
    ("has an extension twice (section 4.2)", lambda leaf, _: not leaf.repeated),
    (
        "has a critical extension that is unknown (section 4.2)",
        lambda leaf, _: all(not critical or oid in _KNOWN for oid, (critical, _value) in leaf.extensions.items()),
    ),
    ("is a CA certificate (section 4.2.1.9)", lambda leaf, _: leaf.value(_CONSTRAINTS) in (b"", _NO_CA)),
    ("can sign certificates or CRLs (section 4.2.1.3)", lambda leaf, _: not _signs(leaf.value(_KEY_USAGE))),
    (
        "has no subject, and names that are not critical (section 4.2.1.6)",
        lambda leaf, _: leaf.has_subject or leaf.extensions.get(_NAMES, (True, b""))[0],
    ),
    ("is for another key", lambda leaf, granted: leaf.key == granted.key),
    ("has other names than granted", lambda leaf, granted: _has_names(leaf, granted.requested, granted.allowed)),
    (
        "has other extensions than those of certmount",
        lambda leaf, granted: granted.usages is None or leaf.extensions.keys() == _OWN,
    ),
    (
        "has other usages than granted (section 4.2.1.12)",
        lambda leaf, granted: granted.usages is None or _has_usages(leaf.value(_USAGES), granted.usages),
    ),
)


def lint(der: bytes, granted: GrantedCertificate) -> tuple[LeafFields | None, list[str]]:
    """Return the parts of a certificate, and why it must not leave the authority; each problem follows "the certificate"."""
    try:
        leaf = _parse(der)
        return leaf, [problem for problem, holds in _PROMISES if not holds(leaf, granted)]
    except (ValueError, IndexError, KeyError):
        return None, ["is not an X.509 certificate in DER"]


_Part: TypeAlias = "tuple[int, int, int, int]"
"""An element of DER: its tag, where it starts, where its content starts, and where it ends."""


def _parse(der: bytes) -> LeafFields:
    """Return the parts; raises ValueError or IndexError."""
    if len(der) > _MAX_BYTES:
        raise ValueError
    (certificate,) = _parts(der, 0, len(der))
    body, outer_algorithm, _ = _children(der, certificate)
    version, serial, algorithm, _, validity, subject, key, *optional = _children(der, body)
    if version[0] != _VERSION or not optional or optional[-1][0] != _EXTENSIONS:
        raise ValueError
    extensions: dict[bytes, tuple[bool, bytes]] = {}
    (wrapped,) = _children(der, optional[-1])
    found = _children(der, wrapped)
    for each in found:
        encoded = _element(der, each)
        oid, critical, value = _shared(encoded) if len(encoded) <= _SHARED_BYTES else _extension(encoded)
        extensions[oid] = critical, value
    not_before, not_after = (_time(der, one) for one in _children(der, validity))
    return LeafFields(
        der,
        _content(der, version),
        _content(der, serial),
        _element(der, algorithm),
        _element(der, outer_algorithm),
        not_before,
        not_after,
        bool(_content(der, subject)),
        _element(der, key),
        extensions,
        len(extensions) < len(found),
    )


def _extension(encoded: bytes) -> tuple[bytes, bool, bytes]:
    """Return the OID, whether it is critical, and the value; raises ValueError or IndexError."""
    (extension,) = _parts(encoded, 0, len(encoded))
    oid, *critical, value = _children(encoded, extension)
    return _content(encoded, oid), bool(critical) and _content(encoded, critical[0]) == _TRUE, _content(encoded, value)


# Nearly all certificates have the same basic constraints, key usages, and identifier of their issuer.
_shared = lru_cache(maxsize=128)(_extension)


def _parts(der: bytes, position: int, end: int) -> list[_Part]:
    """Return the elements between two positions; raises ValueError or IndexError if they are damaged or too many."""
    parts: list[_Part] = []
    while position < end:
        content, length = position + 2, der[position + 1]
        if length >= 0x80:
            content, length = content + length - 0x80, int.from_bytes(der[content : content + length - 0x80])
        stop = content + length
        if stop > end or len(parts) > _MAX_ELEMENTS:
            raise ValueError
        parts.append((der[position], position, content, stop))
        position = stop
    return parts


def _children(der: bytes, part: _Part) -> list[_Part]:
    return _parts(der, part[2], part[3])


def _content(der: bytes, part: _Part) -> bytes:
    return der[part[2] : part[3]]


def _element(der: bytes, part: _Part) -> bytes:
    return der[part[1] : part[3]]


def _time(der: bytes, part: _Part) -> int:
    text, tag = _content(der, part), part[0]
    digits = {_UTC_TIME: 12, _GENERALIZED_TIME: 14}[tag]
    if len(text) != digits + 1 or not text[:-1].isdigit() or text[-1:] != b"Z":
        raise ValueError
    number = int(text[:-1])
    if tag == _UTC_TIME:
        number += (20 if int(text[:2]) < _CENTURY_BREAK else 19) * 10**12
    return number


def _seconds(time: int) -> int:
    """Return the seconds since the year 1; raises ValueError for an impossible time."""
    day, clock = divmod(time, 10**6)
    days = date(day // 10**4, day // 100 % 100, day % 100).toordinal()
    return days * 86400 + clock // 10**4 * 3600 + clock // 100 % 100 * 60 + clock % 100


def _positive(serial: bytes) -> bool:
    return 0 < len(serial) <= _MAX_SERIAL_BYTES and serial[0] < 0x80 and any(serial)


def _signs(key_usage: bytes) -> bool:
    """Return whether a KeyUsage (a BIT STRING) has a bit that only CAs have."""
    return len(key_usage) > 3 and bool(key_usage[3] & (_SIGNS_CERTIFICATES | _SIGNS_CRLS))


def _has_usages(value: bytes, usages: tuple[Usage, ...]) -> bool:
    return _purposes(value) == {_PURPOSES[usage] for usage in usages}


@lru_cache(maxsize=16)
def _purposes(value: bytes) -> frozenset[bytes]:
    return frozenset(_element(value, one) for one in _list(value))


def _list(value: bytes) -> list[_Part]:
    """Return the elements of a SEQUENCE; none if there is no value."""
    return [one for sequence in _parts(value, 0, len(value)) for one in _children(value, sequence)]


def _has_names(leaf: LeafFields, requested: Names, allowed: Names) -> bool:
    """Return whether the certificate has all requested names, and only allowed ones."""
    value = leaf.value(_NAMES)
    found = {(name[0], _content(value, name)) for name in _list(value)}
    if _encoded(requested) <= found <= _encoded(allowed):
        return True
    try:  # other CAs can write a name in another way, for example in upper case
        names = {*names_of(x509.load_der_x509_certificate(leaf.der).extensions)}
    except PARSE_ERRORS:
        return False
    return {*requested} <= names <= {*allowed}


def _encoded(names: Names) -> set[tuple[int, bytes]]:
    encoded: set[tuple[int, bytes]] = {(_DNS, name.text.encode()) for name in names.dns}
    encoded.update([(_URI, uri.text.encode()) for uri in names.uris])
    if names.ips or names.emails:
        encoded.update((_IP, ip.address.packed) for ip in names.ips)
        encoded.update((_EMAIL, email.text.encode()) for email in names.emails)
    return encoded
