"""Name patterns of a policy, with literal text, ``*`` and ``{placeholders}``.

A pattern is split at its separators before placeholders are replaced, so a value that contains a separator (a pod can be
named ``www.shop``) never matches two labels. For the same reason, the host of a URI accepts only the placeholders for
domains.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Self

from csi_driver.core.names import URI, DNSName, EmailAddress, InvalidName
from csi_driver.core.subject import SubjectAttribute
from csi_driver.core.texts import shortened

PLACEHOLDERS = ("namespace", "service_account", "pod", "service", "trust_domain", "cluster_domain")
_DOMAIN_PLACEHOLDERS = ("trust_domain", "cluster_domain")
"""Replaced when the policy is parsed. Their values can contain several labels."""
_SERVICE = "{service}"
"""The only placeholder with several values. A pattern matches if it matches with one value in all places."""
_TYPOGRAPHIC_QUOTES = re.compile("[\u201c-\u201f\u2018-\u201b\u00ab\u00bb]")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_DNS_TEXT = re.compile(r"[a-z0-9*._-]+", re.ASCII)
_URI_TEXT = re.compile(r"[A-Za-z0-9*._~!$&'()+,;=:@/-]+", re.ASCII)
_SUBJECT_TEXT = re.compile(r"[A-Z]+=[^\x00-\x1f{}]+")
_EMAIL_TEXT = re.compile(r"[A-Za-z0-9*.#$&'+/=?^_|~-]+@[a-z0-9*._-]+", re.ASCII)
# A mask such as 255.0.0.0 is ambiguous: it could be a network mask or a host mask.
_RANGE = re.compile(r"[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?", re.ASCII)
_VALUE = re.compile(r"[a-z0-9.-]+", re.ASCII)
_MAX_LENGTH = 2048
_MAX_SHOWN = 70
_MISSING_DOT = re.compile(r"(?:(?<=^)|(?<=[.@]))(?:\*|\{[a-z_]+\})(?=[a-z0-9{])", re.ASCII)
"""A star or placeholder at the beginning of a label with text after it: ``*example.com``."""


class InvalidPattern(ValueError):
    """A text is not a pattern. The message follows the text in an error."""


@unique
class _Form(Enum):
    """The type of a pattern: its characters, and how it is split into parts."""

    DNS = _DNS_TEXT
    URI = _URI_TEXT
    EMAIL = _EMAIL_TEXT
    SUBJECT = _SUBJECT_TEXT

    def parse_name(self, text: str) -> None:
        """Raise :class:`csi_driver.core.names.InvalidName` if no certificate can contain the text as a name of this type."""
        parsers: dict[_Form, Callable[[str], object]] = {
            _Form.DNS: DNSName.parse,
            _Form.URI: URI.parse,
            _Form.EMAIL: EmailAddress.parse,
            _Form.SUBJECT: SubjectAttribute.parse,
        }
        parsers[self](text)

    def split(self, text: str) -> list[str]:
        if self is _Form.SUBJECT:
            return [text]
        if self is _Form.EMAIL:
            local, _, domain = text.partition("@")
            return [local, *domain.split(".")]
        return text.split("." if self is _Form.DNS else "/")


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A pattern for DNS names, URIs or email addresses.

    The parts are labels, or the segments of a URI, or the local part of an address and then labels.
    """

    text: str
    parts: tuple[str, ...]
    _form: _Form = field(repr=False)
    ends: tuple[str, str] = field(repr=False, compare=False)
    """The literal text with which every matching name begins, and the one with which it ends; a literal pattern is an end."""

    @classmethod
    def for_dns(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Parse a pattern such as ``*.{namespace}.svc``. ``domains`` contains trust_domain and cluster_domain."""
        return cls._parse(text, _Form.DNS, domains)

    @classmethod
    def for_uri(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Parse a pattern such as ``spiffe://{trust_domain}/ns/{namespace}/app/*``."""
        pattern = cls._parse(text, _Form.URI, domains)
        if (
            len(pattern.parts) < 3
            or not pattern.parts[0].endswith(":")
            or pattern.parts[1]
            or not pattern.parts[2]
            or set("*{") & set(pattern.parts[0] + pattern.parts[2])
        ):
            # A value with a dot would change the host.
            raise InvalidPattern("does not have the form scheme://host/path with a literal scheme and host")
        return pattern

    @classmethod
    def for_email(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Parse a pattern such as ``{service_account}@*.example.com``."""
        return cls._parse(text, _Form.EMAIL, domains)

    @classmethod
    def for_subject(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Parse a pattern such as ``O=Example`` or ``CN={service_account}`` for one attribute of a subject."""
        return cls._parse(text, _Form.SUBJECT, domains)

    @classmethod
    def _parse(cls, text: str, form: _Form, domains: Mapping[str, str]) -> Self:
        if len(text) > _MAX_LENGTH:
            raise InvalidPattern(f"is {len(text)} characters long; use at most {_MAX_LENGTH}")
        for name in _PLACEHOLDER.findall(text):
            if name not in PLACEHOLDERS:
                raise InvalidPattern(
                    f"has the unknown placeholder {{{name}}}; use "
                    + ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
                )
        bare = _PLACEHOLDER.sub("x", text)
        if not form.value.fullmatch(bare):
            if form is _Form.SUBJECT:
                raise InvalidPattern("does not have the form TYPE=VALUE, such as O=Example")
            if form is _Form.EMAIL and bare.count("@") != 1:
                raise InvalidPattern("does not have the form name@domain")
            if _TYPOGRAPHIC_QUOTES.search(bare):
                raise InvalidPattern("has typographic quotes, which are part of the text in YAML; use \" or '")
            hint = "; use lower case" if form.value.fullmatch(bare.lower()) else ""
            raise InvalidPattern("has characters that such names cannot have" + hint if bare else "is empty")
        if "**" in bare:
            raise InvalidPattern("has **; a * matches within one label or path segment")
        for name in _DOMAIN_PLACEHOLDERS:
            text = text.replace(f"{{{name}}}", domains[name])
        begin, *variable = re.split(r"[*{]", text)
        ends = (begin if variable else "", re.split(r"[*}]", text)[-1])
        pattern = cls(text, tuple(form.split(text)), form, ends)
        try:
            form.parse_name(pattern.example)
        except InvalidName as problem:
            raise InvalidPattern(
                str(problem) if text == pattern.example else _impossible(pattern.example, problem)
            ) from None
        return pattern

    @property
    def example(self) -> str:
        """The shortest matching name. If it is not valid, no name that matches is."""
        return shortest_match(_PLACEHOLDER.sub("*", self.text))

    @property
    def placeholders(self) -> frozenset[str]:
        """The names of the placeholders that a request replaces."""
        return frozenset(_PLACEHOLDER.findall(self.text))

    @property
    def warning(self) -> str | None:
        """What the pattern probably allows by mistake, and what to write."""
        if self._form in (_Form.URI, _Form.SUBJECT) or not (match := _MISSING_DOT.search(self.text)):
            return None
        evil = self.text[: match.start()] + "evil" + self.text[match.end() :]
        dotted = self.text[: match.end()] + "." + self.text[match.end() :]
        return f"{self.text!r} also allows {evil}; for the names below the domain, write {dotted}"

    def matches(self, name: str, values: Mapping[str, str], services: Sequence[str] = ()) -> bool:
        """Return whether the name matches.

        ``values`` (namespace, and of pods service_account and pod) replace the placeholders, and one of ``services`` replaces ``{service}``.
        """
        parts = self._form.split(name)
        if len(parts) != len(self.parts):
            return False
        service_parts: list[tuple[str, str]] = []
        for pattern, part in zip(self.parts, parts, strict=True):
            if _SERVICE in pattern:
                service_parts.append((pattern, part))
            elif not _part_matches(pattern, part, values):
                return False
        return not service_parts or any(
            all(service in part for _, part in service_parts)  # fast, and false for most
            and all(_part_matches(pattern, part, {**values, "service": service}) for pattern, part in service_parts)
            for service in services
        )

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class IPRange:
    """An IP network or a single address."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``10.0.0.0/8``, ``fd00::/8`` or an address (RFC 4632 section 3.1); raises :class:`InvalidPattern`."""
        try:
            network = ipaddress.ip_network(text if _RANGE.fullmatch(text) else "", strict=False)
        except ValueError:
            raise InvalidPattern("is not an IP address or range, such as 10.0.0.0/8 or fd00::/64") from None
        if ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
            raise InvalidPattern(f"has bits set after the prefix; use {network} for that range")
        if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
            raise InvalidPattern("is a range of IPv4-mapped IPv6 addresses, which no certificate contains; use IPv4")
        return cls(network)

    def __str__(self) -> str:
        return str(self.network) if self.network.num_addresses > 1 else str(self.network.network_address)


def _part_matches(pattern: str, part: str, values: Mapping[str, str]) -> bool:
    if pattern == part:
        return "{" not in pattern
    if part == "*":
        return False  # only the pattern * allows a wildcard name
    if "{" in pattern:
        for placeholder in _PLACEHOLDER.findall(pattern):
            value = values[placeholder]
            if not _VALUE.fullmatch(value):
                return False
            pattern = pattern.replace(f"{{{placeholder}}}", value)
    return part == pattern if "*" not in pattern else glob_matches(pattern, part)


def shortest_match(glob: str) -> str:
    """Return the shortest text that a pattern with ``*`` matches. If it is not a valid name, no text that matches is."""
    return glob.replace("*", "a")


def _impossible(example: str, problem: InvalidName) -> str:
    return f"matches no valid name: {shortened(example, _MAX_SHOWN)!r} {problem}"


def glob_matches(pattern: str, text: str) -> bool:
    """Return whether a text matches a pattern with ``*``, which stands for one or more characters.

    Regular expressions would have to be compiled, and no cache is large enough for all patterns with the names of pods.
    """
    first, *inner, last = pattern.split("*")
    if not text.startswith(first) or "\n" in text:
        return False
    end = len(first)
    # The first occurrence of each literal loses no match, so the time grows linearly with the length of the text.
    for literal in inner:
        start = text.find(literal, end + 1)
        if start < 0:
            return False
        end = start + len(literal)
    return end < len(text) - len(last) and text.endswith(last)
