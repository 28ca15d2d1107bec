"""Patterns of names, as a policy writes them: literal parts, ``*`` and ``{placeholders}``.

A pattern is cut into parts at its separator before anything is put into its placeholders, so a value that holds the
separator (a pod may be named ``www.shop``) can never spread over two labels of a name. The host of a URI takes the
administrator's own domains only, for the same reason.
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
"""The administrator's own values, known when the policy is read; they may span several labels."""
_SERVICE = "{service}"
"""The one placeholder of many values: a pattern fits if it does for one of them, the same one in all its places."""
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_DNS_TEXT = re.compile(r"[a-z0-9*._-]+", re.ASCII)
_URI_TEXT = re.compile(r"[A-Za-z0-9*._~!$&'()+,;=:@/-]+", re.ASCII)
_EMAIL_TEXT = re.compile(r"[A-Za-z0-9*.#$&'+/=?^_|~-]+@[a-z0-9*._-]+", re.ASCII)
# A mask in other forms, such as 255.0.0.0, can be read as the network's or as the host's.
_RANGE = re.compile(r"[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?", re.ASCII)
_VALUE = re.compile(r"[a-z0-9.-]+", re.ASCII)
_MAX_LENGTH = 2048


class InvalidPattern(ValueError):
    """Why a text is no pattern, in words for the administrator."""


@unique
class _Form(Enum):
    """How the texts of one kind of name are cut into parts, and the characters a pattern of that kind may have."""

    DNS = _DNS_TEXT
    URI = _URI_TEXT
    EMAIL = _EMAIL_TEXT

    def cut(self, text: str) -> list[str]:
        if self is _Form.EMAIL:
            local, _, domain = text.partition("@")
            return [local, *domain.split(".")]
        return text.split("." if self is _Form.DNS else "/")


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A pattern of DNS names (parts are labels), URIs (what lies between slashes) or e-mail addresses (what is before the @, then labels)."""

    text: str
    parts: tuple[str, ...]
    _form: _Form = field(repr=False)
    _end: str = field(repr=False, compare=False)
    """What every name that fits ends with: most names are told apart by it, in a tenth of the time."""

    @classmethod
    def for_dns(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Takes a pattern such as ``*.{namespace}.svc``; ``domains`` holds trust_domain and cluster_domain."""
        return cls._parse(text, _Form.DNS, domains)

    @classmethod
    def for_uri(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Takes a pattern such as ``spiffe://{trust_domain}/ns/{namespace}/app/*``."""
        pattern = cls._parse(text, _Form.URI, domains)
        if (
            len(pattern.parts) < 3
            or not pattern.parts[0].endswith(":")
            or pattern.parts[1]
            or not pattern.parts[2]
            or set("*{") & set(pattern.parts[0] + pattern.parts[2])
        ):
            # Dots in a value put into the host would make it another host.
            raise InvalidPattern("is not of the form scheme://host/path with scheme and host written out")
        return pattern

    @classmethod
    def for_email(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Takes a pattern such as ``{service_account}@*.example.com``."""
        return cls._parse(text, _Form.EMAIL, domains)

    @classmethod
    def _parse(cls, text: str, form: _Form, domains: Mapping[str, str]) -> Self:
        if len(text) > _MAX_LENGTH:
            raise InvalidPattern(f"is {len(text)} characters long; a pattern has at most {_MAX_LENGTH}")
        for name in _PLACEHOLDER.findall(text):
            if name not in PLACEHOLDERS:
                raise InvalidPattern(
                    f"has the unknown placeholder {{{name}}}; known are "
                    + ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
                )
        bare = _PLACEHOLDER.sub("x", text)
        if not form.value.fullmatch(bare):
            if form is _Form.EMAIL and bare.count("@") != 1:
                raise InvalidPattern("is not of the form name@domain")
            capitals = "; write it in lower case" if form.value.fullmatch(bare.lower()) else ""
            raise InvalidPattern("has characters that no such name has" + capitals if bare else "is empty")
        if "**" in bare:
            raise InvalidPattern("has **; a * stands within one label or path segment")
        for name in _DOMAIN_PLACEHOLDERS:
            text = text.replace(f"{{{name}}}", domains[name])
        return cls(text, tuple(form.cut(text)), form, re.split(r"[*}]", text)[-1])

    def matches(self, name: str, values: Mapping[str, str], services: Sequence[str] = ()) -> bool:
        """True when the name has the pattern's parts.

        ``values`` (namespace, service_account, pod) stand in the placeholders, and one of ``services`` in ``{service}``.
        """
        if not name.endswith(self._end):
            return False
        parts = self._form.cut(name)
        if len(parts) != len(self.parts):
            return False
        open_parts: list[tuple[str, str]] = []
        for pattern, part in zip(self.parts, parts, strict=True):
            if _SERVICE in pattern:
                open_parts.append((pattern, part))
            elif not _part_matches(pattern, part, values):
                return False
        return not open_parts or any(
            all(service in part for _, part in open_parts)  # costs little, and most fail here
            and all(_part_matches(pattern, part, {**values, "service": service}) for pattern, part in open_parts)
            for service in services
        )

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class IPRange:
    """A network of IP addresses, or one address."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network

    @classmethod
    def parse(cls, text: str) -> Self:
        """Takes ``10.0.0.0/8``, ``fd00::/8`` or an address (RFC 4632 section 3.1), or raises :class:`InvalidPattern`."""
        try:
            network = ipaddress.ip_network(text if _RANGE.fullmatch(text) else "", strict=False)
        except ValueError:
            raise InvalidPattern("is not an IP address or range, such as 10.0.0.0/8 or fd00::/64") from None
        if ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
            raise InvalidPattern(f"has bits set behind its length; for that range write {network}")
        if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
            raise InvalidPattern(
                "is of IPv4 addresses in the dress of IPv6, which no certificate gets; write the IPv4 range"
            )
        return cls(network)

    def matches(self, name: IPAddress) -> bool:
        """True when the address lies in the range."""
        return name.address in self.network

    def __str__(self) -> str:
        return str(self.network) if self.network.num_addresses > 1 else str(self.network.network_address)


def _part_matches(pattern: str, part: str, values: Mapping[str, str]) -> bool:
    if pattern == part:
        return "{" not in pattern
    if part == "*":
        return False  # a wildcard name is allowed by the bare * only, never by a pattern that happens to cover it
    if "{" in pattern:
        for placeholder in _PLACEHOLDER.findall(pattern):
            value = values[placeholder]
            if not _VALUE.fullmatch(value):
                return False
            pattern = pattern.replace(f"{{{placeholder}}}", value)
    return part == pattern if "*" not in pattern else compile_glob(pattern).fullmatch(part) is not None


@lru_cache(maxsize=4096)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """A regular expression for a pattern with a ``*``, which stands for one or more characters; all else stands for itself."""
    first, *inner, last = (re.escape(literal) for literal in pattern.split("*"))
    # Pods choose the texts: each literal is taken where it first comes and kept (atomic), which loses no match, so that
    # the time grows with the text's length and not with its power of the number of stars.
    return re.compile(first + "".join(f"(?>.+?{literal})" for literal in inner) + ".+" + last)
