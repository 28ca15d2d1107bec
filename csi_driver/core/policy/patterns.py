"""Name patterns of a policy, with literal text, ``*`` and ``{placeholders}``.

A pattern is split at its separators before placeholders are replaced, so a value that contains a separator (a pod can be
named ``www.shop``) never matches two labels. For the same reason, the host of a URI accepts only the placeholders for
domains.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from functools import lru_cache
from typing import Self

from csi_driver.core.names import IPAddress

PLACEHOLDERS = ("namespace", "service_account", "pod", "service", "trust_domain", "cluster_domain")
_DOMAIN_PLACEHOLDERS = ("trust_domain", "cluster_domain")
"""Replaced when the policy is parsed. Their values can contain several labels."""
_SERVICE = "{service}"
"""The only placeholder with several values. A pattern matches if it matches with one value in all places."""
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_DNS_TEXT = re.compile(r"[a-z0-9*._-]+", re.ASCII)
_URI_TEXT = re.compile(r"[A-Za-z0-9*._~!$&'()+,;=:@/-]+", re.ASCII)
_EMAIL_TEXT = re.compile(r"[A-Za-z0-9*.#$&'+/=?^_|~-]+@[a-z0-9*._-]+", re.ASCII)
# A mask such as 255.0.0.0 is ambiguous: it could be a network mask or a host mask.
_RANGE = re.compile(r"[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?", re.ASCII)
_VALUE = re.compile(r"[a-z0-9.-]+", re.ASCII)
_MAX_LENGTH = 2048


class InvalidPattern(ValueError):
    """A text is not a pattern. The message follows the text in an error."""


@unique
class _Form(Enum):
    """The type of a pattern: its characters, and how it is split into parts."""

    DNS = _DNS_TEXT
    URI = _URI_TEXT
    EMAIL = _EMAIL_TEXT

    def split(self, text: str) -> list[str]:
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
    _suffix: str = field(repr=False, compare=False)
    """The end of every matching name. Comparing it first rejects most names in a tenth of the time."""

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
            if form is _Form.EMAIL and bare.count("@") != 1:
                raise InvalidPattern("does not have the form name@domain")
            hint = "; use lower case" if form.value.fullmatch(bare.lower()) else ""
            raise InvalidPattern("has characters that such names cannot have" + hint if bare else "is empty")
        if "**" in bare:
            raise InvalidPattern("has **; a * matches within one label or path segment")
        for name in _DOMAIN_PLACEHOLDERS:
            text = text.replace(f"{{{name}}}", domains[name])
        return cls(text, tuple(form.split(text)), form, re.split(r"[*}]", text)[-1])

    def matches(self, name: str, values: Mapping[str, str], services: Sequence[str] = ()) -> bool:
        """Return whether the name matches.

        ``values`` (namespace, service_account, pod) replace the placeholders, and one of ``services`` replaces ``{service}``.
        """
        if not name.endswith(self._suffix):
            return False
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

    def matches(self, name: IPAddress) -> bool:
        """Return whether the address is in the range."""
        return name.address in self.network

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
    return part == pattern if "*" not in pattern else compile_glob(pattern).fullmatch(part) is not None


@lru_cache(maxsize=4096)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """Return a regular expression for a pattern with ``*``, which matches one or more characters."""
    first, *inner, last = (re.escape(literal) for literal in pattern.split("*"))
    # Pods choose the names. Each literal matches its first occurrence without backtracking (atomic group), which loses no
    # match. The time therefore grows linearly with the length of the name, not exponentially with the number of stars.
    return re.compile(first + "".join(f"(?>.+?{literal})" for literal in inner) + ".+" + last)
