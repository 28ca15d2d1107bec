"""The names a certificate may carry. A value of these types is valid by construction: ``parse`` is the only way in."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

# RFC 1123 section 2.1 and RFC 1035 section 2.3.4: letters, digits, hyphens; 63 octets a label, 253 a name.
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_MAX_DNS_LENGTH = 253
# RFC 3986 section 2: what may stand in a URI. Left out on purpose: fragments, user information, brackets, and "%", by
# which one path can be written in two ways.
_URI = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+)(?P<path>(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]*)*)", re.ASCII
)
_MAX_URI_LENGTH = 2048
# SPIFFE-ID, section 2.2: the characters of a path segment.
_SPIFFE_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}", re.ASCII)
_DOT_SEGMENTS = (".", "..")
# RFC 5322 section 3.4.1 has an address as dot-atom "@" domain. Left out on purpose: quoted local parts; "%" and "!", by
# which old mail systems route on; "*", "{" and "}", which mean something in a policy; and "`".
_LOCAL_PART = re.compile(r"[A-Za-z0-9#$&'+/=?^_|~-]+(?:\.[A-Za-z0-9#$&'+/=?^_|~-]+)*", re.ASCII)
_MAX_LOCAL_PART = 64
_MAX_EMAIL_LENGTH = 254
_IP_TEXT = re.compile(r"[0-9A-Fa-f:.]+", re.ASCII)
# What the API server lets most objects be called: one or more labels with dots between, 253 characters in all.
_OBJECT = re.compile(r"(?!.{254})[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_WORD = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


class InvalidName(ValueError):
    """Why a text is not a name of the wanted kind, in words for whoever wrote it."""


@dataclass(frozen=True, slots=True, order=True)
class DNSName:
    """A fully qualified DNS name as a certificate holds it: lower case, ASCII, no trailing dot; it may start with ``*.``."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes a DNS name, or raises :class:`InvalidName` (RFC 1123 section 2.1, RFC 6125 section 6.4.3)."""
        lowered = text.lower()
        if not text:
            raise InvalidName("is empty")
        if not text.isascii():
            raise InvalidName("has characters outside ASCII; write an internationalised name in its xn-- form")
        if lowered.endswith("."):
            raise InvalidName("ends with a dot; leave the dot away")
        if len(lowered) > _MAX_DNS_LENGTH:
            raise InvalidName(f"is {len(lowered)} characters long; a DNS name has at most {_MAX_DNS_LENGTH}")
        labels = lowered.split(".")
        if labels[0] == "*":
            labels = labels[1:]
            if len(labels) < 2:
                raise InvalidName("is a wildcard over a whole top-level domain; write at least *.example.com")
        for label in labels:
            if "*" in label:
                raise InvalidName("has a * that is not the whole first label")
            if not _LABEL.fullmatch(label):
                raise InvalidName(f"has the label {_shown(label)}; a label is 1-63 letters, digits or inner hyphens")
        if labels[-1].isdigit():
            raise InvalidName("is a number or an IP address, not a DNS name")
        return cls(lowered)

    @property
    def is_wildcard(self) -> bool:
        """True for ``*.example.com``."""
        return self.text.startswith("*.")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, order=True)
class URI:
    """A URI with a scheme, a host and a path; for ``spiffe:`` the stricter rules of SPIFFE-ID hold."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes a URI, or raises :class:`InvalidName` (RFC 3986; SPIFFE-ID section 2)."""
        if not text:
            raise InvalidName("is empty")
        if len(text) > _MAX_URI_LENGTH:
            raise InvalidName(f"is {len(text)} characters long; a URI has at most {_MAX_URI_LENGTH}")
        match = _URI.fullmatch(text)
        if match is None:
            raise InvalidName(
                "is not a URI of the form scheme://host/path in ASCII, lower-case scheme and host, without query, fragment, user, port or %"
            )
        segments = match["path"].split("/")[1:]
        if any(segment in _DOT_SEGMENTS for segment in segments):
            raise InvalidName("has a path segment '.' or '..', which leads elsewhere (RFC 3986 section 5.2.4)")
        if match["scheme"] == "spiffe":
            if not _TRUST_DOMAIN.fullmatch(match["host"]):
                raise InvalidName("is not a SPIFFE ID: its trust domain is longer than 255 characters")
            if any(not _SPIFFE_SEGMENT.fullmatch(segment) for segment in segments):
                raise InvalidName("is not a SPIFFE ID: path segments are letters, digits, '.', '-', '_', never empty")
        return cls(text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, order=True)
class IPAddress:
    """An IPv4 or IPv6 address in its one canonical text (RFC 5952 for IPv6)."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes an address in any of its forms, or raises :class:`InvalidName` (RFC 4291 section 2.2)."""
        if not text:
            raise InvalidName("is empty")
        if "%" in text:
            raise InvalidName("has a zone; a zone means something on its own host only")
        try:
            address = ipaddress.ip_address(text if _IP_TEXT.fullmatch(text) else "")
        except ValueError:
            raise InvalidName("is not an IP address, such as 10.0.0.1 or fd00::1") from None
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            # One address would have two names otherwise, and Pythons differ in how they write the second.
            raise InvalidName(f"is an IPv4 address in the dress of IPv6; write {address.ipv4_mapped}")
        return cls(str(address))

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The address as a value."""
        return ipaddress.ip_address(self.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, order=True)
class EmailAddress:
    """An e-mail address: the local part as it was written, for its case matters, and the domain in lower case."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes an address, or raises :class:`InvalidName` (RFC 5322 section 3.4.1; RFC 5321 section 4.5.3.1 for lengths)."""
        if not text:
            raise InvalidName("is empty")
        if len(text) > _MAX_EMAIL_LENGTH:
            raise InvalidName(f"is {len(text)} characters long; an e-mail address has at most {_MAX_EMAIL_LENGTH}")
        local, at, domain = text.partition("@")
        if not at or not _LOCAL_PART.fullmatch(local):
            raise InvalidName(
                "is not an e-mail address of the form name@domain in plain ASCII, without quotes, %, ! or *"
            )
        if len(local) > _MAX_LOCAL_PART:
            raise InvalidName(f"has {len(local)} characters before the @; at most {_MAX_LOCAL_PART}")
        try:
            host = DNSName.parse(domain)
        except InvalidName as problem:
            raise InvalidName(f"has a domain that {problem}") from None
        if host.is_wildcard:
            raise InvalidName("has a domain with a *, which is nobody's address")
        return cls(f"{local}@{host}")

    def __str__(self) -> str:
        return self.text


Name = DNSName | URI | IPAddress | EmailAddress


@dataclass(frozen=True, slots=True)
class Names:
    """Subject alternative names, each once, in the order they were asked for."""

    dns: tuple[DNSName, ...] = ()
    uris: tuple[URI, ...] = ()
    ips: tuple[IPAddress, ...] = ()
    emails: tuple[EmailAddress, ...] = ()

    @classmethod
    def of(
        cls,
        dns: Iterable[DNSName] = (),
        uris: Iterable[URI] = (),
        ips: Iterable[IPAddress] = (),
        emails: Iterable[EmailAddress] = (),
    ) -> Self:
        """Drops repetitions, keeps the order."""
        return cls(
            tuple(dict.fromkeys(dns)),
            tuple(dict.fromkeys(uris)),
            tuple(dict.fromkeys(ips)),
            tuple(dict.fromkeys(emails)),
        )

    def __len__(self) -> int:
        return len(self.dns) + len(self.uris) + len(self.ips) + len(self.emails)

    def __iter__(self) -> Iterator[Name]:
        yield from self.dns
        yield from self.uris
        yield from self.ips
        yield from self.emails

    def __str__(self) -> str:
        return ", ".join(str(name) for name in self)


def parse_dns_label(text: str) -> str:
    """Takes an administrator's name for an issuer or a set of roots, or raises :class:`InvalidName`."""
    if not _WORD.fullmatch(text):
        raise InvalidName("is not a name: 1-63 lower-case letters, digits and inner hyphens")
    return text


def parse_object_name(text: str) -> str:
    """Takes the name of a Kubernetes object (RFC 1123 section 2.1), or raises :class:`InvalidName`."""
    if not _OBJECT.fullmatch(text):
        raise InvalidName("is not the name of a Kubernetes object: lower-case letters, digits, '-' and '.'")
    return text


def parse_trust_domain(text: str) -> str:
    """Takes a SPIFFE trust domain (SPIFFE-ID section 2.1), or raises :class:`InvalidName`."""
    if not _TRUST_DOMAIN.fullmatch(text):
        raise InvalidName("is not a trust domain: 1-255 lower-case letters, digits, '.', '-', '_'")
    return text


def spiffe_id(trust_domain: str, namespace: str, service_account: str) -> URI:
    """The SPIFFE ID of a service account, in the form that the field has settled on."""
    return URI.parse(f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 70 else text[:67] + "...")
