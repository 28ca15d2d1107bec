"""Who may have which name. Rules add up; what no rule allows is refused; the pod's own SPIFFE ID is always granted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.names import URI, DNSName, Names, spiffe_id
from csi_driver.core.patterns import NamePattern, compile_glob
from csi_driver.core.spec import LEAST_DURATION

DEFAULT_DURATION = timedelta(hours=24)
"""The life of a certificate whose pod asks for none, and the longest one that a rule without ``max_duration`` allows."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What the pods of some namespaces and service accounts may have."""

    namespaces: tuple[str, ...]
    service_accounts: tuple[str, ...]
    dns: tuple[NamePattern, ...] = ()
    uris: tuple[NamePattern, ...] = ()
    max_duration: timedelta = DEFAULT_DURATION

    def applies_to(self, identity: PodIdentity) -> bool:
        """True when one of the rule's globs fits the namespace and one the service account."""
        account = identity.service_account
        return _any_glob(self.namespaces, account.namespace) and _any_glob(self.service_accounts, account.name)

    def allows(self, name: DNSName | URI, values: Mapping[str, str]) -> bool:
        """True when one of the rule's patterns fits the name."""
        patterns = self.dns if isinstance(name, DNSName) else self.uris
        return any(pattern.matches(name.text, values) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a pod gets: the names it asked for with its SPIFFE ID among them, and for how long."""

    names: Names
    duration: timedelta


@dataclass(frozen=True, slots=True)
class Policy:
    """The administrator's rules; without any, every pod gets its SPIFFE ID and no other name."""

    trust_domain: str
    rules: tuple[Rule, ...] = ()

    def decide(self, identity: PodIdentity, asked: Names, duration: timedelta | None) -> Grant:
        """Grants all that is asked for, or nothing.

        Raises:
            CertmountError: NameRefused, with one fault for every name that no rule allows and for a life that is too long.
        """
        account = identity.service_account
        own = spiffe_id(self.trust_domain, account.namespace, account.name)
        rules = [rule for rule in self.rules if rule.applies_to(identity)]
        values = {"namespace": account.namespace, "service_account": account.name, "pod": identity.pod_name}
        faults: list[Fault] = []
        longest = max((rule.max_duration for rule in rules), default=DEFAULT_DURATION)
        longest = max(longest, DEFAULT_DURATION)
        names: list[DNSName | URI] = [*asked.dns, *(uri for uri in asked.uris if uri != own)]
        for name in names:
            limits = [rule.max_duration for rule in rules if rule.allows(name, values)]
            if limits:
                longest = min(longest, max(limits))
            else:
                hint = "ask an administrator to add a rule to certmount's policy"
                faults.append(Fault(str(name), f"no policy rule allows this name for service account {account}", hint))
        faults += _duration_faults(duration, longest)
        if faults:
            raise CertmountError(Reason.NAME_REFUSED, *faults)
        return Grant(Names.of(asked.dns, (own, *asked.uris)), duration or min(DEFAULT_DURATION, longest))


def _duration_faults(duration: timedelta | None, longest: timedelta) -> list[Fault]:
    if duration is None:
        return []
    if duration > longest:
        return [
            Fault(
                "duration",
                f"{format_duration(duration)} is longer than policy allows these names",
                f"the most is {format_duration(longest)}",
            )
        ]
    if duration < LEAST_DURATION:
        return [
            Fault(
                "duration",
                f"{format_duration(duration)} is too short",
                f"the least is {format_duration(LEAST_DURATION)}",
            )
        ]
    return []


def _any_glob(globs: tuple[str, ...], text: str) -> bool:
    return any(glob == text or ("*" in glob and compile_glob(glob).fullmatch(text) is not None) for glob in globs)
