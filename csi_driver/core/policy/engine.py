"""Who may have which name. Rules add up; what no rule allows is refused; a deny list goes before all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import URI, DNSName, InvalidName, Name, Names, spiffe_id
from csi_driver.core.policy.decision import NameDecision, PolicyDecision, RuleMismatch
from csi_driver.core.policy.patterns import NamePattern
from csi_driver.core.policy.rules import ALL_USAGES, DEFAULT_DURATION, DenyListEntry, PolicyRule, RuleMatch
from csi_driver.core.spec import DEFAULT_ISSUER, MAX_NAMES, KeyType, Usage

_SERVICE_NAMES = ("{service}.{namespace}.svc", "{service}.{namespace}.svc.{cluster_domain}")
_MOST_SERVICES = (MAX_NAMES - 1) // len(_SERVICE_NAMES)
"""Services of one pod that are looked at: as many as one certificate can name beside the SPIFFE ID."""
_MOST_REMEMBERED = 4096
"""Kinds of pods whose rules are remembered: a few hundred bytes each, and in most clusters all there are."""
_USAGES_BY_DEFAULT = (ALL_USAGES, (Usage.SERVER,), (Usage.CLIENT,))


@dataclass(frozen=True, slots=True)
class RequestedCertificate:
    """What a pod asks for: names and key type of its request, and what its volume says beside."""

    names: Names = Names()
    key_type: KeyType = KeyType.EC_P256
    usages: tuple[Usage, ...] = ()
    """Empty: as many as policy allows."""
    duration: timedelta | None = None
    """None: a day, or as near to it as policy allows."""
    issuer: str = DEFAULT_ISSUER


@dataclass(frozen=True, slots=True)
class PolicySubject:
    """Who asks: a proven pod, and what the cluster says of it."""

    identity: PodIdentity
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    services: tuple[str, ...] = ()
    """Services of the pod's namespace whose selectors fit the pod."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a pod gets: its names with its SPIFFE ID among them, for how long, for which ends of a connection, and by which rules."""

    names: Names
    duration: timedelta
    usages: tuple[Usage, ...]
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """The administrator's rules behind the built-in one: every pod may have its SPIFFE ID and the names of its Services, for a day."""

    trust_domain: str
    cluster_domain: str
    rules: tuple[PolicyRule, ...] = ()
    """Those of the file, in its order."""
    denials: tuple[DenyListEntry, ...] = ()
    revision: str = ""
    """Another text for another file: the first 16 hexadecimal digits of its SHA-256."""
    _all: tuple[PolicyRule, ...] = field(init=False, repr=False, compare=False)
    _labels: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _remembered: dict[tuple[str | None, ...], tuple[URI, tuple[PolicyRule, ...]]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        domains = {"trust_domain": self.trust_domain, "cluster_domain": self.cluster_domain}
        services = tuple(NamePattern.for_dns(pattern, domains) for pattern in _SERVICE_NAMES)
        built_in = PolicyRule(RuleMatch(("*",), ("*",)), dns=services, label="built-in")
        labels = {key for rule in self.rules for key, _ in rule.match.namespace_labels}
        object.__setattr__(self, "_all", (built_in, *self.rules))
        object.__setattr__(self, "_labels", tuple(sorted(labels)))
        object.__setattr__(self, "_remembered", {})

    def denial(self, account: ServiceAccount) -> str | None:
        """Why the service account gets nothing at all, in the administrator's words; None where it is not denied."""
        denied = self._denied(account)
        return denied.reason if denied else None

    def decide(self, subject: PolicySubject, asked: RequestedCertificate) -> Grant:
        """Grants all that is asked for, or nothing.

        Raises:
            CertmountError: ServiceAccountDenied; or NameNotAllowed with a fault for each refused name, which says what would have to change.
        """
        verdict = self.judge(subject, asked)
        if not verdict.allowed:
            raise CertmountError(
                Reason.NAME_NOT_ALLOWED if verdict.denied is None else Reason.SERVICE_ACCOUNT_DENIED, *verdict.faults()
            )
        own, _ = self._matching(verdict.account, subject.namespace_labels)
        implied = (judged.name for judged in verdict.implied if isinstance(judged.name, DNSName))
        return Grant(
            Names.of(
                (*asked.names.dns, *implied),
                (own, *asked.names.uris),
                asked.names.ips,
                asked.names.emails,
            ),
            verdict.duration,
            verdict.usages,
            verdict.behind,
        )

    def judge(self, subject: PolicySubject, asked: RequestedCertificate) -> PolicyDecision:
        """What the policy says of each name that is asked for, of the pod's own SPIFFE ID, and of what is implied."""
        account = subject.identity.service_account
        denied = self._denied(account)
        if denied is not None:
            return PolicyDecision(account, denied=denied)
        own, rules = self._matching(account, subject.namespace_labels)
        return _Case(subject, asked, own, rules).verdict(self.cluster_domain)

    def _denied(self, account: ServiceAccount) -> DenyListEntry | None:
        return next((denial for denial in self.denials if denial.match.fits(account, {})), None)

    def _matching(self, account: ServiceAccount, labels: Mapping[str, str]) -> tuple[URI, tuple[PolicyRule, ...]]:
        """A pod's own SPIFFE ID, and the rules for it, the built-in one first."""
        key = (account.namespace, account.name, *(labels.get(label) for label in self._labels))
        known = self._remembered.get(key)
        if known is None:
            own = spiffe_id(self.trust_domain, account.namespace, account.name)
            known = own, tuple(rule for rule in self._all if rule.match.fits(account, labels))
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = known
        return known


class _Case:
    """One request before the rules for its pod."""

    def __init__(
        self, subject: PolicySubject, asked: RequestedCertificate, own: URI, rules: tuple[PolicyRule, ...]
    ) -> None:
        account = subject.identity.service_account
        self._account = account
        self._values = {
            "namespace": account.namespace,
            "service_account": account.name,
            "pod": subject.identity.pod_name,
        }
        self._services = sorted(subject.services)[:_MOST_SERVICES] if subject.services else ()
        self._asked = asked
        self._usages = tuple(usage for usage in ALL_USAGES if usage in asked.usages)
        self._rules = rules
        self._own = own
        self._names = (*(name for name in asked.names if name != own), own)

    def verdict(self, cluster_domain: str) -> PolicyDecision:
        usages = self._usages or ALL_USAGES
        duration = DEFAULT_DURATION if self._asked.duration is None else self._asked.duration
        names = self._granted(self._rules, usages, duration)
        if names is None:  # few requests come here
            permitting = [rule for rule in self._rules if self._permits(rule, self._usages, self._asked.duration)]
            able = [[rule for rule in permitting if self._fits(rule, name)] for name in self._names]
            if not all(able):
                return PolicyDecision(self._account, self._rules, tuple(map(self._judged, self._names, able)))
            choice = next(self._choices(able), None)
            if choice is None:
                return PolicyDecision(
                    self._account, self._rules, tuple(map(_offered, self._names, able)), together=False
                )
            usages, duration = choice
            names = self._granted(permitting, usages, duration) or ()
        implied = () if self._asked.names else tuple(self._implied(usages, duration, cluster_domain))
        return PolicyDecision(self._account, self._rules, names, implied, usages, duration)

    def _granted(
        self, rules: Sequence[PolicyRule], usages: Sequence[Usage], duration: timedelta
    ) -> tuple[NameDecision, ...] | None:
        """Each name with the first of the rules that allows it with these usages and this life; None where one has no such rule."""
        permitting = [rule for rule in rules if self._permits(rule, usages, duration)]
        granted: list[NameDecision] = []
        for name in self._names:
            for rule in permitting:
                if self._fits(rule, name):
                    granted.append(NameDecision(name, rule.label))
                    break
            else:
                return None
        return tuple(granted)

    def _permits(self, rule: PolicyRule, usages: Sequence[Usage], duration: timedelta | None) -> bool:
        return rule.limits.permit(self._asked.key_type, self._asked.issuer, usages, duration)

    def _fits(self, rule: PolicyRule, name: Name) -> bool:
        return name == self._own or rule.allows(name, self._values, self._services)

    def _judged(self, name: Name, able: Sequence[PolicyRule]) -> NameDecision:
        """The judgement of a name where not all are allowed."""
        if able:
            return NameDecision(name, able[0].label)
        asked = self._asked
        return NameDecision(
            name,
            objections=tuple(
                RuleMismatch(
                    rule.label,
                    rule.limits.obstacles(asked.key_type, asked.issuer, self._usages, asked.duration)
                    if self._fits(rule, name)
                    else (),
                )
                for rule in self._rules
            ),
        )

    def _choices(self, able: Sequence[Sequence[PolicyRule]]) -> Iterator[tuple[tuple[Usage, ...], timedelta]]:
        """Usages and lives that every name may be had with, the best first: both usages before one, a day before what is near to it."""
        for usages in (self._usages,) if self._usages else _USAGES_BY_DEFAULT:
            for duration in self._durations():
                if all(any(self._permits(rule, usages, duration) for rule in rules) for rules in able):
                    yield usages, duration

    def _durations(self) -> Iterator[timedelta]:
        if self._asked.duration is not None:
            yield self._asked.duration
            return
        yield DEFAULT_DURATION
        # Of what several spans have in common, the point nearest to any other point is an end of one of them.
        ends = {end for rule in self._rules for end in (rule.limits.min_duration, rule.limits.max_duration)}
        yield from sorted(ends, key=lambda end: (abs(end - DEFAULT_DURATION), end))

    def _implied(self, usages: tuple[Usage, ...], duration: timedelta, cluster_domain: str) -> Iterator[NameDecision]:
        """The names of the pod's Services, as far as they are allowed like the rest."""
        rules = [rule for rule in self._rules if self._permits(rule, usages, duration)]
        for service in self._services:
            for pattern in _SERVICE_NAMES:
                try:
                    name = DNSName.parse(pattern.format(service=service, cluster_domain=cluster_domain, **self._values))
                except InvalidName:
                    continue  # too long with this cluster's domain: it is nobody's name
                allowing = next((rule for rule in rules if rule.allows(name, self._values, self._services)), None)
                if allowing is not None:
                    yield NameDecision(name, allowing.label)


def _offered(name: Name, able: Sequence[PolicyRule]) -> NameDecision:
    """The judgement of a name that may be had, but not with what the other names may be had with."""
    return NameDecision(name, objections=tuple(RuleMismatch(rule.label, (rule.limits.offer,)) for rule in able))
