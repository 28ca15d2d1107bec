"""The subject of a certificate (RFC 5280 section 4.1.2.6), as users write it: ``CN=shop,O=Example`` (RFC 4514)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from cryptography import x509
from cryptography.x509.oid import NameOID

from csi_driver.core.names import InvalidName, Names

MAX_SUBJECT_LENGTH = 1024
"""Bytes in UTF-8. With it, the subject of a certificate is shorter than ``der_bounds.MAX_SUBJECT_BYTES``."""
MAX_SUBJECT_ATTRIBUTES = 10
COMMON_NAME = "CN"
_OIDS = {
    COMMON_NAME: NameOID.COMMON_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "C": NameOID.COUNTRY_NAME,
    "ST": NameOID.STATE_OR_PROVINCE_NAME,
    "L": NameOID.LOCALITY_NAME,
    "STREET": NameOID.STREET_ADDRESS,
    "POSTALCODE": NameOID.POSTAL_CODE,
    "SERIALNUMBER": NameOID.SERIAL_NUMBER,
}
_TYPES = {oid: name for name, oid in _OIDS.items()}
# The types whose value is a PrintableString (RFC 5280 appendix A.1), with what they can contain. In a certificate, other
# characters are no DER: TLS libraries reject the certificate.
_PRINTABLE = {
    "C": (re.compile("[A-Za-z]{2}"), "2 letters"),
    "SERIALNUMBER": (re.compile("[A-Za-z0-9 '()+,./:=?-]+"), "letters, digits, spaces and ' ( ) + , - . / : = ?"),
}
_SPACE = re.compile(r"(?<!\\), +")  # people write it, and the library does not accept it
_RESERVED = "system:"
"""Kubernetes trusts common names and organizations with this prefix, if it trusts the CA."""


@dataclass(frozen=True, slots=True)
class SubjectAttribute:
    """One attribute, such as ``CN=shop``: the text is not escaped."""

    type: str
    value: str

    @property
    def text(self) -> str:
        return f"{self.type}={self.value}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the attribute in an unescaped text; raises :class:`InvalidName`."""
        name, equals, value = text.partition("=")
        if name not in _OIDS or not equals:
            raise InvalidName(f"is not TYPE=VALUE with a type of {', '.join(_OIDS)}")
        return cls(name, _checked(name, value))


@dataclass(frozen=True, slots=True)
class Subject:
    """The attributes of a subject in the order of RFC 4514, which is the reverse of that in the certificate."""

    attributes: tuple[SubjectAttribute, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a subject (RFC 4514); raises :class:`InvalidName`."""
        if (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_SUBJECT_LENGTH:
            raise InvalidName(f"is {size} bytes long; a subject has at most {MAX_SUBJECT_LENGTH}")
        try:
            name = x509.Name.from_rfc4514_string(_SPACE.sub(",", text), _OIDS)
        except (ValueError, KeyError, TypeError):
            raise InvalidName(
                "is not a subject such as CN=shop,O=Example (RFC 4514) with values of 1 to 64 bytes, and a backslash "
                'before , + " \\ < > and ;'
            ) from None
        return cls.of(name)

    @classmethod
    def of(cls, name: x509.Name) -> Self:
        """Return the subject of a CSR or a certificate; raises :class:`InvalidName`."""
        if any(len(rdn) != 1 for rdn in name.rdns):
            raise InvalidName("has two attributes that are joined by +; separate them by a comma")
        if not 0 < len(name.rdns) <= MAX_SUBJECT_ATTRIBUTES:
            raise InvalidName(f"has {len(name.rdns)} attributes; use 1 to {MAX_SUBJECT_ATTRIBUTES}")
        unknown = [attribute.oid.dotted_string for attribute in name if attribute.oid not in _TYPES]
        if unknown:
            raise InvalidName(f"has the unknown attribute type {unknown[0]}; use {', '.join(_OIDS)}")
        found = [(_TYPES[attribute.oid], str(attribute.value)) for attribute in reversed(list(name))]
        if [kind for kind, _ in found].count(COMMON_NAME) > 1:
            raise InvalidName("has more than one common name")
        return cls(tuple(SubjectAttribute(kind, _checked(kind, value)) for kind, value in found))

    @classmethod
    def of_common_name(cls, text: str) -> Self:
        """Return the subject that has only a common name; raises :class:`InvalidName`."""
        return cls((SubjectAttribute(COMMON_NAME, _checked(COMMON_NAME, text)),))

    def __bool__(self) -> bool:
        return bool(self.attributes)

    def __str__(self) -> str:
        return self.name.rfc4514_string({oid: name for name, oid in _OIDS.items()})

    @property
    def name(self) -> x509.Name:
        return x509.Name([x509.NameAttribute(_OIDS[one.type], one.value) for one in reversed(self.attributes)])

    def beyond(self, names: Names) -> tuple[SubjectAttribute, ...]:
        """Return the attributes that say more than these names: all except a common name that is one of the DNS names."""
        if not self.attributes:
            return ()
        known = {name.text for name in names.dns}
        return tuple(one for one in self.attributes if one.type != COMMON_NAME or one.value not in known)


def _checked(kind: str, value: str) -> str:
    """Return the value of an attribute; raises InvalidName."""
    if not value.isprintable() or value != value.strip():
        raise InvalidName(f"has the attribute {kind} with control characters, or with spaces around its value")
    if value.lower().startswith(_RESERVED):
        raise InvalidName(f"has the attribute {kind} with the prefix {_RESERVED}, which is reserved for Kubernetes")
    try:
        x509.NameAttribute(_OIDS[kind], value)
    except ValueError:
        expected = "2 letters" if kind == "C" else "1 to 64 bytes of UTF-8"
        raise InvalidName(f"has the attribute {kind} with {len(value.encode())} bytes; expected {expected}") from None
    pattern, expected = _PRINTABLE.get(kind, (None, ""))
    if pattern is not None and not pattern.fullmatch(value):
        raise InvalidName(f"has the attribute {kind} with other characters than it can have; use {expected}")
    return value
