"""Policy rules: which pods or Secrets a rule matches, which names it allows, and within which limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.attributes import IssuanceOptions
from csi_driver.core.durations import format_duration
from csi_driver.core.identity import Principal, SecretIdentity
from csi_driver.core.names import DNSName, EmailAddress, IPAddress, Name
from csi_driver.core.policy.pattern_index import PatternIndex, RangeIndex
from csi_driver.core.policy.patterns import glob_matches
from csi_driver.core.spec import DEFAULT_ISSUER, MIN_DURATION, KeyType, Usage
from csi_driver.core.subject import SubjectAttribute

DEFAULT_DURATION = timedelta(hours=24)
"""The lifetime of a certificate without ``duration``, and the maximum of a rule without ``max_duration``."""
ALL_USAGES = (Usage.SERVER, Usage.CLIENT)
_ADD_SUBJECT = "add it to subjects in the policy"
_ADD_ACCOUNT = "add it to acme_emails in the policy"


@dataclass(frozen=True, slots=True)
class RuleMatch:
    """Globs for namespaces and names, of which one each must match, and for labels, which all must match.

    The names are those of service accounts or of Secrets. A rule for the ones never matches the others.
    """

    namespaces: tuple[str, ...]
    service_accounts: tuple[str, ...] = ()
    namespace_labels: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()

    def matches(self, principal: Principal, labels: Mapping[str, str]) -> bool:
        """Return whether the rule is for this service account or Secret in a namespace with these labels."""
        names = self.secrets if isinstance(principal, SecretIdentity) else self.service_accounts
        return (
            _any_matches(self.namespaces, principal.namespace)
            and _any_matches(names, principal.name)
            and all(key in labels and _any_matches((glob,), labels[key]) for key, glob in self.namespace_labels)
        )


@dataclass(frozen=True, slots=True)
class Violation:
    """An attribute of a request that is outside the limits of a rule."""

    attribute: str
    value: str
    relation: str  # such as "is longer than the 24h": what "that policy[0] allows" follows
    allowed: str  # such as "duration 10s to 24h"
    fix: str  # such as "use at most 24h"
    distance: float = 0.0  # from the limit: seconds of a duration, or attributes of a subject
    change: str = "change the policy"  # what an administrator can do

    def __str__(self) -> str:
        return f"{self.allowed}, not {self.value}"


@dataclass(frozen=True, slots=True)
class RuleLimits:
    """The limits of certificates with a rule's names."""

    key_types: tuple[KeyType, ...] = tuple(KeyType)
    usages: tuple[Usage, ...] = ALL_USAGES
    min_duration: timedelta = MIN_DURATION
    max_duration: timedelta = DEFAULT_DURATION
    issuers: tuple[str, ...] = (DEFAULT_ISSUER,)
    without_spiffe_id: bool = False

    def allow(self, options: IssuanceOptions, key_type: KeyType) -> bool:
        """Return whether a request is within the limits. Empty usages and no duration are."""
        usages, duration = options.usages, options.duration
        return (
            key_type in self.key_types
            and options.issuer in self.issuers
            and (not usages or all(usage in self.usages for usage in usages))
            and (duration is None or self.min_duration <= duration <= self.max_duration)
            and (options.spiffe or self.without_spiffe_id)
        )

    def violations(self, options: IssuanceOptions, key_type: KeyType) -> tuple[Violation, ...]:
        """Return a violation for each limit that a request exceeds; none if :meth:`allow` returns True."""
        found: list[Violation] = []
        duration, issuer = options.duration, options.issuer
        if key_type not in self.key_types:
            allowed = " or ".join(kind.value for kind in self.key_types)
            found.append(
                Violation("key-type", key_type.value, "is not a key type", f"key-type {allowed}", f"use {allowed}")
            )
        if issuer not in self.issuers:
            allowed = " or ".join(self.issuers)
            found.append(Violation("issuer", issuer, "is not an issuer", f"issuer {allowed}", f"use {allowed}"))
        if excess := [usage.value for usage in options.usages if usage not in self.usages]:
            allowed = " and ".join(usage.value for usage in self.usages)
            found.append(Violation("usages", " and ".join(excess), "is not a usage", self._usages, f"use {allowed}"))
        if duration is not None:
            found += self._duration_violations(duration)
        if not options.spiffe and not self.without_spiffe_id:
            change = "set without_spiffe_id in the policy"
            allowed, fix = 'spiffe "true"', "omit the attribute"
            found.append(Violation("spiffe", '"false"', "is not a value", allowed, fix, change=change))
        return tuple(found)

    def _duration_violations(self, duration: timedelta) -> Iterator[Violation]:
        for excess, bound, longer, fix in (
            (duration - self.max_duration, self.max_duration, "longer", "use at most"),
            (self.min_duration - duration, self.min_duration, "shorter", "use at least"),
        ):
            if excess > timedelta():
                value, limit = format_duration(duration), format_duration(bound)
                texts = value, f"is {longer} than the {limit}", self._durations, f"{fix} {limit}"
                yield Violation("duration", *texts, excess.total_seconds())

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
    """The names that matching pods or Secrets can request. Every rule also allows a pod's own SPIFFE ID within its limits."""

    match: RuleMatch
    dns: PatternIndex = PatternIndex()
    own_dns: PatternIndex = PatternIndex()  # in which {service} is only the pod's governing Service
    uris: PatternIndex = PatternIndex()
    ips: RangeIndex = RangeIndex()
    emails: PatternIndex = PatternIndex()
    limits: RuleLimits = RuleLimits()
    acme_emails: PatternIndex = PatternIndex()  # whose ACME accounts can order, in addition to the issuer's
    subjects: PatternIndex = PatternIndex()  # of single attributes of the subject
    label: str = ""  # the place in the file, such as ``policy[1] (line 12)``

    def allows(self, name: Name, values: Mapping[str, str], services: Sequence[str]) -> bool:
        """Return whether a pattern matches the name, regardless of the limits."""
        if isinstance(name, IPAddress):
            return self.ips.matches(name)
        if isinstance(name, DNSName):
            patterns = self.dns
        else:
            patterns = self.emails if isinstance(name, EmailAddress) else self.uris
        return patterns.matches(name.text, values, services)

    def allows_own_name(self, name: Name, values: Mapping[str, str], governing: Sequence[str]) -> bool:
        """Return whether it is the pod's own name below its governing Service, and the rule allows these names."""
        return isinstance(name, DNSName) and self.own_dns.matches(name.text, values, governing)

    def allows_account(self, email: EmailAddress, values: Mapping[str, str]) -> bool:
        """Return whether the ACME account with this address can order the certificate."""
        return self.acme_emails.matches(email.text, values)

    def account_violation(self, email: EmailAddress) -> Violation:
        """Return the violation if :meth:`allows_account` returns False."""
        allowed = " or ".join(pattern.text for pattern in self.acme_emails.patterns)
        texts = f"email {allowed}" if allowed else "no email", f"use {allowed}" if allowed else "omit it"
        return Violation("email", email.text, "is not the address of an ACME account", *texts, change=_ADD_ACCOUNT)

    def forbidden_attributes(
        self, attributes: Sequence[SubjectAttribute], values: Mapping[str, str], services: Sequence[str]
    ) -> list[str]:
        """Return the attributes of a subject that no pattern matches."""
        texts = [attribute.text for attribute in attributes]
        return [text for text in texts if not self.subjects.matches(text, values, services)]

    def subject_violation(self, forbidden: Sequence[str]) -> Violation:
        """Return the violation for what :meth:`forbidden_attributes` returns."""
        allowed = " or ".join(pattern.text for pattern in self.subjects.patterns)
        texts = f"subject {allowed}" if allowed else "no subject", f"use {allowed}" if allowed else "omit it"
        distance = float(len(forbidden) + (not self.subjects.patterns))
        return Violation("subject", ", ".join(forbidden), "is not a subject", *texts, distance, change=_ADD_SUBJECT)


@dataclass(frozen=True, slots=True)
class DenyListEntry:
    """Service accounts or Secrets that get no certificate, and the administrator's reason."""

    match: RuleMatch
    reason: str
    label: str = ""


def _any_matches(globs: Sequence[str], text: str) -> bool:
    for glob in globs:  # noqa: SIM110  # faster than any() with a generator, and a policy can have a million globs
        if glob == text or ("*" in glob and glob_matches(glob, text)):
            return True
    return False
