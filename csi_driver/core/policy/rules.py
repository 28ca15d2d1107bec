"""One rule of the policy: which pods it is for, which names it allows them, and within which limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.durations import format_duration
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import DNSName, EmailAddress, IPAddress, Name
from csi_driver.core.policy.patterns import IPRange, NamePattern, compile_glob
from csi_driver.core.spec import DEFAULT_ISSUER, MIN_DURATION, KeyType, Usage

DEFAULT_DURATION = timedelta(hours=24)
"""The life of a certificate whose pod asks for none, and the longest one that a rule without ``max_duration`` allows."""
ALL_USAGES = (Usage.SERVER, Usage.CLIENT)


@dataclass(frozen=True, slots=True)
class RuleMatch:
    """Which pods: one glob of each kind must fit, and the namespace must have each label with a value that its glob fits."""

    namespaces: tuple[str, ...]
    service_accounts: tuple[str, ...]
    namespace_labels: tuple[tuple[str, str], ...] = ()

    def fits(self, account: ServiceAccount, labels: Mapping[str, str]) -> bool:
        """True for pods of this service account, in a namespace with these labels."""
        return (
            any(_glob_fits(glob, account.namespace) for glob in self.namespaces)
            and any(_glob_fits(glob, account.name) for glob in self.service_accounts)
            and all(key in labels and _glob_fits(glob, labels[key]) for key, glob in self.namespace_labels)
        )


@dataclass(frozen=True, slots=True)
class RuleLimits:
    """What a rule's names may be had with."""

    key_types: tuple[KeyType, ...] = tuple(KeyType)
    usages: tuple[Usage, ...] = ALL_USAGES
    min_duration: timedelta = MIN_DURATION
    max_duration: timedelta = DEFAULT_DURATION
    issuers: tuple[str, ...] = (DEFAULT_ISSUER,)

    def permit(self, key_type: KeyType, issuer: str, usages: Sequence[Usage], duration: timedelta | None) -> bool:
        """True when nothing of a request is outside; no usages and no duration are those that were not asked for."""
        return (
            key_type in self.key_types
            and issuer in self.issuers
            and (not usages or all(usage in self.usages for usage in usages))
            and (duration is None or self.min_duration <= duration <= self.max_duration)
        )

    def obstacles(
        self, key_type: KeyType, issuer: str, usages: Sequence[Usage], duration: timedelta | None
    ) -> tuple[str, ...]:
        """What of a request is outside, in words; nothing where :meth:`permit` is true."""
        found: list[str] = []
        if key_type not in self.key_types:
            found.append(f"key-type {_one_of(kind.value for kind in self.key_types)}, not {key_type.value}")
        if issuer not in self.issuers:
            found.append(f"issuer {_one_of(self.issuers)}, not {issuer}")
        if refused := [usage.value for usage in usages if usage not in self.usages]:
            found.append(f"usages {self._usages}, not {', '.join(refused)}")
        if duration is not None and not self.min_duration <= duration <= self.max_duration:
            found.append(f"duration {self._span}, not {format_duration(duration)}")
        return tuple(found)

    @property
    def offer(self) -> str:
        """Usages and lives that are allowed, in words."""
        return f"usages {self._usages} and duration {self._span}"

    @property
    def _usages(self) -> str:
        return ", ".join(usage.value for usage in self.usages)

    @property
    def _span(self) -> str:
        return f"{format_duration(self.min_duration)} to {format_duration(self.max_duration)}"


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """What the pods that it matches may have, besides their own SPIFFE ID, which every such rule allows within its limits."""

    match: RuleMatch
    dns: tuple[NamePattern, ...] = ()
    uris: tuple[NamePattern, ...] = ()
    ips: tuple[IPRange, ...] = ()
    emails: tuple[NamePattern, ...] = ()
    limits: RuleLimits = RuleLimits()
    label: str = ""
    """Where it stands, for people: ``policy[1] (line 12)``."""

    def allows(self, name: Name, values: Mapping[str, str], services: Sequence[str]) -> bool:
        """True when one of the rule's patterns fits the name, whatever the limits."""
        if isinstance(name, IPAddress):
            return any(known.matches(name) for known in self.ips)
        if isinstance(name, DNSName):
            patterns = self.dns
        else:
            patterns = self.emails if isinstance(name, EmailAddress) else self.uris
        return any(pattern.matches(name.text, values, services) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class DenyListEntry:
    """Service accounts that get no certificate at all, and the administrator's reason."""

    match: RuleMatch
    reason: str
    label: str = ""


def _glob_fits(glob: str, text: str) -> bool:
    return glob == text or ("*" in glob and compile_glob(glob).fullmatch(text) is not None)


def _one_of(words: Iterable[str]) -> str:
    return " or ".join(words)
