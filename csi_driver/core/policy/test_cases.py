"""A table of cases that a policy must decide as its administrator says: read, and held against the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, parse_dns_label, parse_object_name, parse_trust_domain
from csi_driver.core.policy.engine import Policy, PolicySubject, RequestedCertificate

MOST_CASES = 10_000
_MOST_SERVICES = 1000
_MOST_TEXT = 4096


@dataclass(frozen=True, slots=True)
class PolicyTestCase:
    """A pod that asks, and what the policy is to say."""

    label: str
    """Where it stands, for people: ``cases[1] (line 12)``."""
    subject: PolicySubject
    asked: RequestedCertificate
    allowed: bool
    rule: str
    """The rule or entry of the deny list that is to be behind it, such as ``policy[1]``; empty: whichever."""

    def failure(self, policy: Policy) -> str | None:
        """In words how the policy decides otherwise; None where it decides as expected."""
        verdict = policy.judge(self.subject, self.asked)
        if verdict.allowed is not self.allowed:
            if verdict.allowed:
                return f"is allowed by {' and '.join(verdict.behind)}, but is expected to be refused"
            told = " ".join(str(fault) for fault in verdict.faults())
            return f"is refused, but is expected to be allowed: {told}"
        behind = [label.partition(" ")[0] for label in verdict.behind]
        if self.rule and self.rule not in behind:
            return f"is {'allowed' if self.allowed else 'refused'} as expected, but by {' and '.join(behind) or 'no rule'}, not by {self.rule}"
        return None

    def __str__(self) -> str:
        pod, names = self.subject.identity, str(self.asked.names)
        return f"{self.label}: {pod.service_account} asking for {names or 'no name'}"


@dataclass(frozen=True, slots=True)
class PolicyTestTable:
    """The cases of one file, and what they are about."""

    policy: str
    """The path of the policy's file, seen from the table's."""
    trust_domain: str
    cluster_domain: str
    cases: tuple[PolicyTestCase, ...]


def parse_cases(document: object, lines: Mapping[Path, int]) -> PolicyTestTable:
    """Takes the table's content: ``{"policy": PATH, "cases": [{"pod": ..., "ask": ..., "expect": "allowed"}, ...]}``.

    Raises:
        CertmountError: InvalidPolicy, with one fault for everything that is wrong.
    """
    reader = _Reader(Reason.INVALID_POLICY, "table of cases", lines)
    allowed = ("policy", "trust_domain", "cluster_domain", "cases")
    top = reader.mapping((), document, allowed=allowed, required=("policy", "cases"))
    table = PolicyTestTable(
        policy=reader.text(("policy",), top.get("policy"), _text) or "",
        trust_domain=reader.text(("trust_domain",), top.get("trust_domain"), parse_trust_domain) or "cluster.local",
        cluster_domain=reader.text(("cluster_domain",), top.get("cluster_domain"), parse_domain) or "cluster.local",
        cases=reader.each(("cases",), top.get("cases"), reader.case, MOST_CASES),
    )
    reader.finish()
    return table


def pod(namespace: str, service_account: str, name: str) -> PodIdentity:
    """A pod that no token stands for: to ask a policy about, never to trust."""
    return PodIdentity(ServiceAccount(namespace, service_account), "", name, "", "", "", 0)


class _Reader(DocumentReader):
    def case(self, path: Path, entry: object) -> PolicyTestCase | None:
        allowed = ("pod", "ask", "expect", "rule")
        top = self.mapping(path, entry, allowed=allowed, required=("pod", "expect"))
        return PolicyTestCase(
            label=self.label(path),
            subject=self._subject((*path, "pod"), top.get("pod")),
            asked=self._asked((*path, "ask"), top.get("ask")),
            allowed=bool(self.text((*path, "expect"), top.get("expect"), _expectation)),
            rule=self.text((*path, "rule"), top.get("rule"), _text) or "",
        )

    def _subject(self, path: Path, value: object) -> PolicySubject:
        known = ("namespace", "serviceAccount", "name", "services", "namespaceLabels")
        top = {} if value is None else self.mapping(path, value, allowed=known, required=("namespace",))
        return PolicySubject(
            pod(
                self.text((*path, "namespace"), top.get("namespace"), parse_dns_label) or "default",
                self.text((*path, "serviceAccount"), top.get("serviceAccount"), parse_object_name) or "default",
                self.text((*path, "name"), top.get("name"), parse_object_name) or "pod",
            ),
            self._texts((*path, "namespaceLabels"), top.get("namespaceLabels")),
            self.each(
                (*path, "services"),
                top.get("services"),
                lambda at, item: self.text(at, item, parse_object_name),
                _MOST_SERVICES,
            ),
        )

    def _asked(self, path: Path, value: object) -> RequestedCertificate:
        """The attributes of a pod's volume, as they stand in its manifest."""
        try:
            spec = parse_attributes(self._texts(path, value))
        except CertmountError as error:
            for fault in error.faults:
                if isinstance(fault, Fault):
                    self.fault((*path, fault.field.removeprefix("volumeAttributes.")), fault.problem, fault.hint)
            return RequestedCertificate()
        return RequestedCertificate(spec.names, spec.key_type, spec.usages, spec.duration, spec.issuer)

    def _texts(self, path: Path, value: object) -> dict[str, str]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fault(path, "is not a mapping of texts")
            return {}
        read = {str(key): self.text((*path, str(key)), item, _text) for key, item in value.items()}
        return {key: text for key, text in read.items() if text is not None}


def _expectation(text: str) -> bool:
    if text not in ("allowed", "refused"):
        raise ValueError("is not what can be expected; write allowed or refused")
    return text == "allowed"


def parse_domain(text: str) -> str:
    """Takes a DNS domain, or raises :class:`csi_driver.core.names.InvalidName`."""
    return DNSName.parse(text).text


def _text(text: str) -> str:
    if len(text) > _MOST_TEXT:
        raise ValueError(f"is longer than {_MOST_TEXT} characters")
    return text
