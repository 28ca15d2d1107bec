"""Test cases for a policy: parse a table of them, and compare the policy's decisions with the expected ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from csi_driver.core.attributes import CertificateSpec, parse_attributes
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, SecretIdentity, ServiceAccount
from csi_driver.core.names import DNSName, EmailAddress, parse_dns_label, parse_object_name, parse_trust_domain
from csi_driver.core.policy.decision import SECRET_FIELDS
from csi_driver.core.policy.engine import Policy, PolicySubject, RequestedCertificate
from csi_driver.core.variables import pod_variables

_MAX_CASES = 10_000
_MAX_SERVICES = 1000
_MAX_TEXT = 4096
_UID, _NODE = "00000000-0000-0000-0000-000000000000", "node"  # of the pods of all cases, for variables in names
_SECRET_REQUEST = (
    "name", "dns-names", "uri-sans", "ip-sans", "email-sans", "key-type", "duration", "usages", "issuer"
)  # fmt: skip
_ACME_EMAIL = "acme-email"
_RESULTS = {True: "allowed", False: "not allowed"}


@dataclass(frozen=True, slots=True)
class PolicyTestCase:
    """A request with the expected decision."""

    label: str  # the place in the file, such as ``cases[1] (line 12)``
    subject: PolicySubject
    requested: RequestedCertificate
    allowed: bool
    rule: str  # the rule or entry of the deny list that must decide, such as ``policy[1]``; empty for any

    def failure(self, policy: Policy) -> str | None:
        """Describe how the policy's decision differs from the expected one; None if it does not."""
        decision = policy.evaluate(self.subject, self.requested)
        rules = [label.partition(" ")[0] for label in decision.deciding_rules]
        result, expected = _RESULTS[decision.allowed], _RESULTS[self.allowed]
        if decision.allowed is not self.allowed:
            cause = "by " + " and ".join(decision.deciding_rules)
            cause = cause if decision.allowed else " ".join(str(fault) for fault in decision.faults())
            return f"expected {expected}, but is {result}: {cause}"
        if self.rule and self.rule not in rules:
            return f"is {result} as expected, but by {' and '.join(rules) or 'no rule'} instead of {self.rule}"
        return None

    def __str__(self) -> str:
        names = str(self.requested.names) or "no names"
        return f"{self.label}: {self.subject.identity.principal} with {names}"


@dataclass(frozen=True, slots=True)
class PolicyTestTable:
    """The cases of one file."""

    policy: str  # the path of the policy file, relative to the table
    trust_domain: str
    cluster_domain: str
    cases: tuple[PolicyTestCase, ...]


def parse_cases(document: object, lines: Mapping[Path, int]) -> PolicyTestTable:
    """Parse ``{"policy": PATH, "cases": [{"pod": ..., "request": ..., "expect": "allowed"}, ...]}``, or ``secret``, not ``pod``.

    Raises:
        CertmountError: InvalidPolicy with all faults.
    """
    reader = _Reader(Reason.INVALID_POLICY, "test table", lines)
    allowed = ("policy", "trust_domain", "cluster_domain", "cases")
    top = reader.mapping((), document, allowed=allowed, required=("policy", "cases"))
    if top.get("cases") == []:
        reader.fault(("cases",), "is empty", "add at least one case")
    table = PolicyTestTable(
        policy=reader.text(("policy",), top.get("policy"), _text) or "",
        trust_domain=reader.text(("trust_domain",), top.get("trust_domain"), parse_trust_domain) or "cluster.local",
        cluster_domain=reader.text(("cluster_domain",), top.get("cluster_domain"), parse_domain) or "cluster.local",
        cases=reader.items(("cases",), top.get("cases"), reader.case, _MAX_CASES),
    )
    reader.finish()
    return table


def example_pod(namespace: str, service_account: str, name: str) -> PodIdentity:
    """Return a pod for the evaluation of a policy. No token has proved its identity."""
    return PodIdentity(ServiceAccount(namespace, service_account), "", name, "", "", "", 0)


def example_subject(
    pod: PodIdentity, labels: Mapping[str, str], services: tuple[str, ...], governing_service: str
) -> PolicySubject:
    """Return the subject of an example. The governing Service also selects the pod."""
    selecting = dict.fromkeys((*services, *([governing_service] if governing_service else ())))
    return PolicySubject(pod, labels, tuple(selecting), governing_service)


def parse_domain(text: str) -> str:
    """Return a DNS domain; raises :class:`csi_driver.core.names.InvalidName`."""
    return DNSName.parse(text).text


class _Reader(DocumentReader):
    def case(self, path: Path, entry: object) -> PolicyTestCase | None:
        allowed = ("pod", "secret", "request", "expect", "rule")
        top = self.mapping(path, entry, allowed=allowed, required=("expect",))
        given = [key for key in ("pod", "secret") if top.get(key) is not None]
        if not given:
            self.fault((*path, "pod"), "is missing", "a case for a Secret has secret in its place")
        if len(given) > 1:
            self.fault((*path, "secret"), "cannot be used with pod", "use two cases")
        at = (*path, "request")
        if top.get("secret") is not None:
            subject = self._secret((*path, "secret"), top["secret"])
            requested = self._requested_for_secret(at, top.get("request"))
        else:
            pod, subject = self._pod((*path, "pod"), top.get("pod"))
            requested = self._requested(at, top.get("request"), pod)
        return PolicyTestCase(
            label=self.label(path),
            subject=subject,
            requested=requested,
            allowed=bool(self.text((*path, "expect"), top.get("expect"), _expectation)),
            rule=self.text((*path, "rule"), top.get("rule"), _text) or "",
        )

    def _secret(self, path: Path, value: object) -> PolicySubject:
        names = ("namespace", "name")
        top = self.mapping(path, value, allowed=(*names, "namespaceLabels"), required=names)
        namespace = self.text((*path, "namespace"), top.get("namespace"), parse_dns_label) or "default"
        name = self.text((*path, "name"), top.get("name"), parse_object_name) or "secret"
        labels = self._texts((*path, "namespaceLabels"), top.get("namespaceLabels"))
        return PolicySubject(SecretIdentity(namespace, name), labels)

    def _pod(self, path: Path, value: object) -> tuple[PodIdentity, PolicySubject]:
        known = ("namespace", "serviceAccount", "name", "services", "governingService", "namespaceLabels")
        top = {} if value is None else self.mapping(path, value, allowed=known, required=("namespace",))
        namespace = self.text((*path, "namespace"), top.get("namespace"), parse_dns_label) or "default"
        account = self.text((*path, "serviceAccount"), top.get("serviceAccount"), parse_object_name) or "default"
        name = self.text((*path, "name"), top.get("name"), parse_object_name) or "pod"
        services = self.items(
            (*path, "services"),
            top.get("services"),
            lambda at, item: self.text(at, item, parse_object_name),
            _MAX_SERVICES,
        )
        labels = self._texts((*path, "namespaceLabels"), top.get("namespaceLabels"))
        governing = self.text((*path, "governingService"), top.get("governingService"), parse_object_name) or ""
        pod = example_pod(namespace, account, name)
        return pod, example_subject(pod, labels, services, governing)

    def _requested(self, path: Path, value: object, pod: PodIdentity) -> RequestedCertificate:
        """Parse the volume attributes of a pod."""
        account = pod.service_account
        variables = pod_variables(
            namespace=account.namespace, name=pod.pod_name, uid=_UID, service_account=account.name, node=_NODE
        )
        return self._parse(path, self._texts(path, value), variables)

    def _requested_for_secret(self, path: Path, value: object) -> RequestedCertificate:
        allowed = (*_SECRET_REQUEST, _ACME_EMAIL)
        texts = self._texts(path, None if value is None else self.mapping(path, value, allowed=allowed))
        email = self.text((*path, _ACME_EMAIL), texts.pop(_ACME_EMAIL, None), EmailAddress.parse)
        known = {key: text for key, text in texts.items() if key in _SECRET_REQUEST}
        return replace(self._parse(path, known, {}), spiffe=False, acme_email=email, fields=SECRET_FIELDS)

    def _parse(self, path: Path, attributes: Mapping[str, str], variables: Mapping[str, str]) -> RequestedCertificate:
        try:
            spec = parse_attributes(attributes, variables)
        except CertmountError as error:
            for fault in error.faults:
                if isinstance(fault, Fault):
                    self.fault((*path, fault.field.removeprefix("volumeAttributes.")), fault.problem, fault.hint)
            spec = CertificateSpec()
        return RequestedCertificate.of(spec.names, spec.key_type, spec)

    def _texts(self, path: Path, value: object) -> dict[str, str]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fault(path, "is not a mapping of strings")
            return {}
        read = {str(key): self.text((*path, str(key)), item, _text) for key, item in value.items()}
        return {key: text for key, text in read.items() if text is not None}


def _expectation(text: str) -> bool:
    if text not in _RESULTS.values():
        raise ValueError("is not a result; use allowed or not allowed")
    return text == _RESULTS[True]


def _text(text: str) -> str:
    if len(text) > _MAX_TEXT:
        raise ValueError(f"is longer than {_MAX_TEXT} characters")
    return text
