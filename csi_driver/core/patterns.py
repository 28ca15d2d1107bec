"""Patterns of names, as a policy writes them: literal parts, ``*`` and ``{placeholders}``.

A pattern is cut into parts at its separator before anything is put into its placeholders, so a value that holds the
separator (a pod may be named ``www.shop``) can never spread over two labels of a name. The host of a URI takes the
administrator's own domains only, for the same reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

PLACEHOLDERS = ("namespace", "service_account", "pod", "trust_domain", "cluster_domain")
_DOMAIN_PLACEHOLDERS = ("trust_domain", "cluster_domain")
"""The administrator's own values, known when the policy is read; they may span several labels."""
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_DNS_TEXT = re.compile(r"[a-z0-9*._-]+", re.ASCII)
_URI_TEXT = re.compile(r"[A-Za-z0-9*._~!$&'()+,;=:@/-]+", re.ASCII)
_VALUE = re.compile(r"[a-z0-9.-]+", re.ASCII)


class PatternProblem(ValueError):
    """Why a text is no pattern, in words for the administrator."""


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A pattern for DNS names (parts are labels) or URIs (parts are what lies between slashes)."""

    text: str
    separator: str
    parts: tuple[str, ...]

    @classmethod
    def for_dns(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Takes a pattern such as ``*.{namespace}.svc``; ``domains`` holds trust_domain and cluster_domain."""
        return cls._parse(text, ".", _DNS_TEXT, domains)

    @classmethod
    def for_uri(cls, text: str, domains: Mapping[str, str]) -> Self:
        """Takes a pattern such as ``spiffe://{trust_domain}/ns/{namespace}/app/*``."""
        pattern = cls._parse(text, "/", _URI_TEXT, domains)
        if (
            len(pattern.parts) < 3
            or not pattern.parts[0].endswith(":")
            or pattern.parts[1]
            or not pattern.parts[2]
            or set("*{") & set(pattern.parts[0] + pattern.parts[2])
        ):
            # Dots in a value put into the host would make it another host.
            raise PatternProblem("is not of the form scheme://host/path with scheme and host written out")
        return pattern

    @classmethod
    def _parse(cls, text: str, separator: str, allowed: re.Pattern[str], domains: Mapping[str, str]) -> Self:
        for name in _PLACEHOLDER.findall(text):
            if name not in PLACEHOLDERS:
                raise PatternProblem(
                    f"has the unknown placeholder {{{name}}}; known are "
                    + ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
                )
        bare = _PLACEHOLDER.sub("x", text)
        if not allowed.fullmatch(bare):
            raise PatternProblem("has characters that no such name has" if bare else "is empty")
        if "**" in bare:
            raise PatternProblem("has **; a * stands within one label or path segment")
        for name in _DOMAIN_PLACEHOLDERS:
            text = text.replace(f"{{{name}}}", domains[name])
        return cls(text, separator, tuple(text.split(separator)))

    def matches(self, name: str, values: Mapping[str, str]) -> bool:
        """True when the name has the pattern's parts, with ``values`` (namespace, service_account, pod) in the placeholders."""
        parts = name.split(self.separator)
        return len(parts) == len(self.parts) and all(
            _part_matches(pattern, part, values) for pattern, part in zip(self.parts, parts, strict=True)
        )

    def __str__(self) -> str:
        return self.text


def _part_matches(pattern: str, part: str, values: Mapping[str, str]) -> bool:
    if pattern == part:
        return "{" not in pattern
    if part == "*":
        return False  # a wildcard name is allowed by the bare * only, never by a pattern that happens to cover it
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
