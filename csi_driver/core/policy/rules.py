"""Policy rules: which pods a rule matches, which names it allows, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.durations import format_duration
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import DNSName, EmailAddress, IPAddress, Name
from csi_driver.core.policy.patterns import IPRange, NamePattern, compile_glob
from csi_driver.core.spec import DEFAULT_ISSUER, MIN_DURATION, KeyType, Usage

DEFAULT_DURATION = timedelta(hours=24)
"""The lifetime of a certificate without ``duration``, and the maximum of a rule without ``max_duration``."""
ALL_USAGES = (Usage.SERVER, Usage.CLIENT)


@dataclass(frozen=True, slots=True)
class RuleMatch:
    """Globs for namespaces and service accounts, of which one each must match, and for labels, which all must match."""

    namespaces: tuple[str, ...]
    service_accounts: tuple[str, ...]
    namespace_labels: tuple[tuple[str, str], ...] = ()

    def matches(self, account: ServiceAccount, labels: Mapping[str, str]) -> bool:
        """Return whether the rule is for pods of this service account in a namespace with these labels."""
        return (
            any(_glob_matches(glob, account.namespace) for glob in self.namespaces)
            and any(_glob_matches(glob, account.name) for glob in self.service_accounts)
            and all(key in labels and _glob_matches(glob, labels[key]) for key, glob in self.namespace_labels)
        )


@dataclass(frozen=True, slots=True)
class RuleLimits:
    """The limits of certificates with a rule's names."""

    key_types: tuple[KeyType, ...] = tuple(KeyType)
    usages: tuple[Usage, ...] = ALL_USAGES
    min_duration: timedelta = MIN_DURATION
    max_duration: timedelta = DEFAULT_DURATION
    issuers: tuple[str, ...] = (DEFAULT_ISSUER,)

    def allow(self, key_type: KeyType, issuer: str, usages: Sequence[Usage], duration: timedelta | None) -> bool:
        """Return whether a request is within the limits. Empty usages and no duration are."""
        return (
            key_type in self.key_types
            and issuer in self.issuers
            and (not usages or all(usage in self.usages for usage in usages))
            and (duration is None or self.min_duration <= duration <= self.max_duration)
        )

    def violations(
        self, key_type: KeyType, issuer: str, usages: Sequence[Usage], duration: timedelta | None
    ) -> tuple[str, ...]:
        """Describe each limit that a request violates; empty if :meth:`allow` returns True."""
        found: list[str] = []
        if key_type not in self.key_types:
            found.append(f"key-type {' or '.join(kind.value for kind in self.key_types)}, not {key_type.value}")
        if issuer not in self.issuers:
            found.append(f"issuer {' or '.join(self.issuers)}, not {issuer}")
        if excess := [usage.value for usage in usages if usage not in self.usages]:
            found.append(f"{self._usages}, not {', '.join(excess)}")
        if duration is not None and not self.min_duration <= duration <= self.max_duration:
            found.append(f"{self._durations}, not {format_duration(duration)}")
        return tuple(found)

    def __str__(self) -> str:
        """The usages and lifetimes that are allowed."""
        return f"{self._usages} and {self._durations}"

    @property
    def _usages(self) -> str:
        return "usages " + ", ".join(usage.value for usage in self.usages)

    @property
    def _durations(self) -> str:
        return f"duration {format_duration(self.min_duration)} to {format_duration(self.max_duration)}"


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """The names that matching pods can request. Every rule also allows the pod's own SPIFFE ID within its limits."""

    match: RuleMatch
    dns: tuple[NamePattern, ...] = ()
    uris: tuple[NamePattern, ...] = ()
    ips: tuple[IPRange, ...] = ()
    emails: tuple[NamePattern, ...] = ()
    limits: RuleLimits = RuleLimits()
    label: str = ""  # the place in the file, such as ``policy[1] (line 12)``

    def allows(self, name: Name, values: Mapping[str, str], services: Sequence[str]) -> bool:
        """Return whether a pattern matches the name, regardless of the limits."""
        if isinstance(name, IPAddress):
            return any(ip_range.matches(name) for ip_range in self.ips)
        if isinstance(name, DNSName):
            patterns = self.dns
        else:
            patterns = self.emails if isinstance(name, EmailAddress) else self.uris
        return any(pattern.matches(name.text, values, services) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class DenyListEntry:
    """Service accounts that get no certificate, and the administrator's reason."""

    match: RuleMatch
    reason: str
    label: str = ""


def _glob_matches(glob: str, text: str) -> bool:
    return glob == text or ("*" in glob and compile_glob(glob).fullmatch(text) is not None)
