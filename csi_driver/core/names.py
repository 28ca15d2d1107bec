"""Names in certificates. Values of these types are valid: ``parse`` is the only constructor."""

from __future__ import annotations

import ipaddress
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from csi_driver.core.texts import shortened

# RFC 1123 section 2.1 and RFC 1035 section 2.3.4: letters, digits and hyphens; 63 octets per label, 253 per name.
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_LABELS = re.compile(rf"{_LABEL.pattern}(?:\.{_LABEL.pattern})*", re.ASCII)
_MAX_DNS_LENGTH = 253
_MAX_SHOWN = 70  # characters of an invalid label in an error
_ACE_PREFIX = "xn--"  # of internationalized labels (RFC 5890 section 2.3.2.1)
_ACE_LABEL = re.compile(r"xn--[a-z0-9-]+", re.ASCII)
MAX_INTERNATIONALIZED = 4096  # characters, each of which takes about 1 µs to decode
_JOINERS = "\u200c\u200d"  # the only invisible characters of labels (RFC 5892 appendix A)
# RFC 3986 section 2, without fragments, user information, brackets and "%", which would allow two forms of one path.
_URI = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+)(?P<path>(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]*)*)", re.ASCII
)
_MAX_URI_LENGTH = 2048
# SPIFFE-ID section 2.2: the characters of a path segment.
_SPIFFE_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
# Without empty labels: Go cannot parse a certificate with a URI whose host has one.
_TRUST_DOMAIN = re.compile(r"(?!.{256})[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", re.ASCII)
_DOT_SEGMENTS = (".", "..")
# RFC 5322 section 3.4.1 (dot-atom "@" domain), without quoted local parts; "%" and "!", with which old mail systems route;
# "*", "{" and "}", which have a meaning in a policy; and "`".
_LOCAL_PART = re.compile(r"[A-Za-z0-9#$&'+/=?^_|~-]+(?:\.[A-Za-z0-9#$&'+/=?^_|~-]+)*", re.ASCII)
_MAX_LOCAL_PART = 64
_MAX_EMAIL_LENGTH = 254
_IP_TEXT = re.compile(r"[0-9A-Fa-f:.]+", re.ASCII)
# The names of most Kubernetes objects: labels separated by dots, 253 characters in total.
_OBJECT_NAME = re.compile(r"(?!.{254})[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*", re.ASCII)


class InvalidName(ValueError):
    """A text is not a name of the expected type. The message follows the text in an error."""


@dataclass(frozen=True, slots=True, order=True)
class DNSName:
    """A fully qualified DNS name in lower-case ASCII, without a trailing dot. It can start with ``*.``."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a DNS name (RFC 1123 section 2.1, RFC 6125 section 6.4.3); raises :class:`InvalidName`."""
        lowered = text.lower()
        if not text:
            raise InvalidName("is empty")
        if not text.isascii():
            raise InvalidName("has non-ASCII characters; use the xn-- form of an internationalized name")
        if lowered.endswith("."):
            raise InvalidName("ends with a dot; remove it")
        if len(lowered) > _MAX_DNS_LENGTH:
            raise InvalidName(f"is {len(lowered)} characters long; a DNS name has at most {_MAX_DNS_LENGTH}")
        labels = lowered.split(".")
        if labels[0] == "*":
            labels = labels[1:]
            if len(labels) < 2:
                raise InvalidName("is a wildcard for a top-level domain; use at least *.example.com")
        if not _LABELS.fullmatch(".".join(labels)):
            wrong = next(label for label in labels if not _LABEL.fullmatch(label))
            if "*" in wrong:
                raise InvalidName("has a * that is not the complete first label")
            shown = shortened(wrong, _MAX_SHOWN)
            raise InvalidName(f"has the label {shown!r}; labels have 1 to 63 letters, digits or inner hyphens")
        for label in labels:
            if label.startswith(_ACE_PREFIX) and not _is_internationalized(label):
                raise InvalidName(f"has the label {label!r}, which is not the xn-- form of a label (RFC 5891)")
        if labels[-1].isdigit():
            raise InvalidName("is a number or an IP address, not a DNS name")
        return cls(lowered)

    @property
    def is_wildcard(self) -> bool:
        return self.text.startswith("*.")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, order=True)
class URI:
    """A URI with a scheme, a host and a path. A ``spiffe:`` URI is a valid SPIFFE ID."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a URI (RFC 3986; SPIFFE-ID section 2); raises :class:`InvalidName`."""
        if not text:
            raise InvalidName("is empty")
        if len(text) > _MAX_URI_LENGTH:
            raise InvalidName(f"is {len(text)} characters long; a URI has at most {_MAX_URI_LENGTH}")
        match = _URI.fullmatch(text)
        if match is None:
            raise InvalidName(
                "is not a URI of the form scheme://host/path in ASCII with lower-case scheme and host, "
                "without query, fragment, user, port or %"
            )
        if "" in match["host"].split("."):
            raise InvalidName("has a host that begins or ends with a dot, or has two dots together; remove the dot")
        segments = match["path"].split("/")[1:]
        if any(segment in _DOT_SEGMENTS for segment in segments):
            raise InvalidName("has a path segment '.' or '..', which clients remove (RFC 3986 section 5.2.4)")
        if match["scheme"] == "spiffe":
            if not _TRUST_DOMAIN.fullmatch(match["host"]):
                raise InvalidName("is not a SPIFFE ID: its trust domain is longer than 255 characters")
            if any(not _SPIFFE_SEGMENT.fullmatch(segment) for segment in segments):
                raise InvalidName(
                    "is not a SPIFFE ID: path segments consist of letters, digits, '.', '-' and '_', and are not empty"
                )
        return cls(text)

    @property
    def is_spiffe_id(self) -> bool:
        return self.text.startswith("spiffe:")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, order=True)
class IPAddress:
    """An IPv4 or IPv6 address in canonical form (RFC 5952)."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an address in any form (RFC 4291 section 2.2); raises :class:`InvalidName`."""
        if not text:
            raise InvalidName("is empty")
        if "%" in text:
            raise InvalidName("has a zone, which has a meaning only on one host; remove it")
        try:
            address = ipaddress.ip_address(text if _IP_TEXT.fullmatch(text) else "")
        except ValueError:
            raise InvalidName("is not an IP address, such as 10.0.0.1 or fd00::1") from None
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            # Otherwise one address would have two names, and Python versions differ in the form of the second.
            raise InvalidName(f"is an IPv4-mapped IPv6 address; use {address.ipv4_mapped}")
        return cls(str(address))

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        return ipaddress.ip_address(self.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, order=True)
class EmailAddress:
    """An email address. The local part is case-sensitive; the domain is in lower case."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an address (RFC 5322 section 3.4.1; RFC 5321 section 4.5.3.1 for lengths); raises :class:`InvalidName`."""
        if not text:
            raise InvalidName("is empty")
        if len(text) > _MAX_EMAIL_LENGTH:
            raise InvalidName(f"is {len(text)} characters long; an email address has at most {_MAX_EMAIL_LENGTH}")
        local, at, domain = text.partition("@")
        if not at or not _LOCAL_PART.fullmatch(local):
            raise InvalidName("is not an email address of the form name@domain in ASCII, without quotes, %, ! and *")
        if len(local) > _MAX_LOCAL_PART:
            raise InvalidName(f"has {len(local)} characters before the @; use at most {_MAX_LOCAL_PART}")
        try:
            host = DNSName.parse(domain)
        except InvalidName as problem:
            raise InvalidName(f"has a domain that {problem}") from None
        if host.is_wildcard:
            raise InvalidName("has a domain with a *; use a complete domain")
        return cls(f"{local}@{host}")

    def __str__(self) -> str:
        return self.text


Name = DNSName | URI | IPAddress | EmailAddress


@dataclass(frozen=True, slots=True)
class Names:
    """Subject alternative names in the requested order, without duplicates."""

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
        """Remove duplicates and keep the order."""
        unique = dict.fromkeys
        return cls(tuple(unique(dns)), tuple(unique(uris)), tuple(unique(ips)), tuple(unique(emails)))

    def __len__(self) -> int:
        return len(self.dns) + len(self.uris) + len(self.ips) + len(self.emails)

    def __iter__(self) -> Iterator[Name]:
        return itertools.chain(self.dns, self.uris, self.ips, self.emails)

    @property
    def size(self) -> int:
        """The bytes of all names together."""
        return sum(len(name.text) for name in self)

    def __str__(self) -> str:
        return ", ".join(str(name) for name in self)


def parse_dns_label(text: str) -> str:
    """Return a DNS label (RFC 1123), such as the name of an issuer or a root set; raises :class:`InvalidName`."""
    if not _LABEL.fullmatch(text):
        raise InvalidName("is not a name; use 1 to 63 lower-case letters, digits and inner hyphens")
    return text


def parse_object_name(text: str) -> str:
    """Return the name of a Kubernetes object (RFC 1123 section 2.1); raises :class:`InvalidName`."""
    if not _OBJECT_NAME.fullmatch(text):
        raise InvalidName("is not the name of a Kubernetes object; use lower-case letters, digits, '-' and '.'")
    return text


def parse_trust_domain(text: str) -> str:
    """Return a SPIFFE trust domain (SPIFFE-ID section 2.1); raises :class:`InvalidName`."""
    if not _TRUST_DOMAIN.fullmatch(text):
        raise InvalidName(
            "is not a trust domain; use 1 to 255 lower-case letters, digits, '-', '_', and single inner '.'"
        )
    return text


def spiffe_id(trust_domain: str, namespace: str, service_account: str) -> URI:
    """Return the SPIFFE ID of a service account in its usual form."""
    return URI.parse(f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")


def internationalized_problem(names: Iterable[str]) -> str:
    """Return a text if the names of a certificate have so many different xn-- labels that they must not be decoded; else ``""``."""
    labels = {label for name in names for label in _ACE_LABEL.findall(name.lower())}
    if sum(map(len, labels)) <= MAX_INTERNATIONALIZED:
        return ""
    return f"has more than {MAX_INTERNATIONALIZED} characters of different xn-- labels"


@lru_cache(1024)
def _is_internationalized(label: str) -> bool:
    """Return whether a label that starts with ``xn--`` represents one with other letters (RFC 5891 section 4.2, RFC 5892).

    As for public CAs, it must be encoded correctly, and normalized. Which scripts can be mixed is up to registries.
    """
    encoded = label.removeprefix(_ACE_PREFIX)
    try:
        text = encoded.encode("ascii").decode("punycode")
    except UnicodeError:
        return False
    # A delimiter after no basic characters is the only part that can be omitted (RFC 3492 section 6.3).
    is_unique = encoded.rfind("-") != 0
    if not is_unique or text.isascii() or text != text.lower() or text != unicodedata.normalize("NFC", text):
        return False
    return all(character in _JOINERS or unicodedata.category(character)[0] not in "CZ" for character in text)
