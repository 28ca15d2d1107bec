"""``certmount policy``: validate a policy file, explain its decisions, and test them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

from csi_driver.authority.policy.policy_file import read_policy
from csi_driver.cli.common import option
from csi_driver.config.located_yaml import MAX_BYTES, read_yaml
from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import Requester, SecretIdentity
from csi_driver.core.names import (
    URI,
    DNSName,
    EmailAddress,
    IPAddress,
    Names,
    parse_dns_label,
    parse_object_name,
    parse_trust_domain,
)
from csi_driver.core.policy.decision import SECRET_FIELDS, NameDecision, PolicyDecision
from csi_driver.core.policy.engine import Policy, PolicySubject, RequestedCertificate
from csi_driver.core.policy.test_cases import PolicyTestTable, example_pod, example_subject, parse_cases, parse_domain
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType, parse_key_type, parse_usage
from csi_driver.core.subject import Subject
from csi_driver.core.texts import count

_MOUNTED_POLICY = "/etc/certmount/policy/policy.yaml"
"""The path in the authority's pod, so that ``kubectl exec deploy/certmount-authority`` needs no option."""
_NOT_ALLOWED, _UNUSABLE = 1, 2
_PATH = click.Path(path_type=Path, dir_okay=False)
_trust_domain = option("--trust-domain", "", parse_trust_domain, default="cluster.local")
_cluster_domain = option("--cluster-domain", "", parse_domain, default="cluster.local")


def _label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError("is not KEY=VALUE")
    return key, value


@click.group(name="policy")
def command() -> None:
    """Check a policy file, explain its decisions, and test them."""


@command.command()
@click.argument("file", type=_PATH, default=_MOUNTED_POLICY)
@_trust_domain
@_cluster_domain
def check(file: Path, trust_domain: str, cluster_domain: str) -> None:
    """Validate FILE and print all faults and warnings. The exit status is 1 if there is a fault."""
    try:
        policy = read_policy(_content(file), trust_domain=trust_domain, cluster_domain=cluster_domain)
    except CertmountError as error:
        _end(_NOT_ALLOWED, *(f"{file}: {fault}" for fault in error.faults))
    for warning in policy.warnings:
        click.echo(f"{file}: warning: {warning}", err=True)
    click.echo(
        f"{file}: valid, {count(len(policy.rules), 'rule')}, {count(len(policy.denials), 'denial')}, "
        f"revision {policy.revision}"
    )


@command.command()
@option("--file", "The policy file.", type=_PATH, default=_MOUNTED_POLICY)
@option("--namespace", "The namespace of the pod or Secret.", parse_dns_label, required=True)
@option("--secret", "A Secret that requests the certificate, not a pod.", parse_object_name)
@option("--service-account", "The pod's account.", parse_object_name, default="default")
@option("--pod", "The pod's name, for {pod}.", parse_object_name, default="pod")
@option("--service", "A Service that selects the pod. Repeatable.", parse_object_name, multiple=True)
@option(
    "--governing-service",
    "The headless Service below which DNS has the pod's name, as of a StatefulSet.",
    parse_object_name,
)
@option("--namespace-label", "A label KEY=VALUE of the pod's namespace. Repeatable.", _label, multiple=True)
@option("--name", "A requested DNS name. Repeatable.", DNSName.parse, multiple=True)
@option("--uri", "A requested URI. Repeatable.", URI.parse, multiple=True)
@option("--ip", "A requested IP address. Repeatable.", IPAddress.parse, multiple=True)
@option("--email", "A requested email address. Repeatable.", EmailAddress.parse, multiple=True)
@option("--key-type", "", parse_key_type, default=KeyType.EC_P256.value)
@option("--usage", "server or client. Repeatable.", parse_usage, multiple=True)
@option("--duration", "The requested lifetime, such as 1h30m.", parse_duration)
@option("--subject", "The requested subject, such as CN=shop.", Subject.parse)
@option("--spiffe/--no-spiffe", "Include the pod's SPIFFE ID.", default=True)
@option("--acme-email", "For a Secret: the email address of the ACME account.", EmailAddress.parse)
@option("--issuer", "", parse_dns_label, default=DEFAULT_ISSUER)
@_trust_domain
@_cluster_domain
def explain(file: Path, trust_domain: str, cluster_domain: str, **given: Any) -> None:
    """Explain for each requested name which rule allows it, or why none does. The exit status is 1 if one is not allowed."""
    policy = _policy(file, trust_domain, cluster_domain)
    names = Names.of(given["name"], given["uri"], given["ip"], given["email"])
    options = {key: given[key] for key in ("duration", "issuer", "spiffe")}
    requested = RequestedCertificate(
        names, given["key_type"], usages=given["usage"], subject=given["subject"] or Subject(), **options
    )
    identity: Requester = example_pod(given["namespace"], given["service_account"], given["pod"])
    if given["secret"] is not None:
        identity = SecretIdentity(given["namespace"], given["secret"])
        requested = replace(requested, spiffe=False, acme_email=given["acme_email"], fields=SECRET_FIELDS)
    labels = dict(given["namespace_label"])
    subject = (
        PolicySubject(identity, labels)
        if isinstance(identity, SecretIdentity)
        else example_subject(identity, labels, given["service"], given["governing_service"] or "")
    )
    decision = policy.evaluate(subject, requested)
    for line in _explanation(policy, decision):
        click.echo(line)
    if not decision.allowed:
        _end(_NOT_ALLOWED)


@command.command()
@click.argument("table", metavar="FILE", type=_PATH)
def test(table: Path) -> None:
    """Test a policy with the cases in FILE. The exit status is 1 if a decision differs from the expected one."""
    cases = _table(table)
    file = table.parent / cases.policy
    policy = _policy(file, cases.trust_domain, cases.cluster_domain)
    failed = 0
    for case in cases.cases:
        failure = case.failure(policy)
        if failure is not None:
            failed += 1
            click.echo(f"FAILED {case}: {failure}")
    click.echo(f"{count(len(cases.cases), 'case')}, {failed} failed: {file}, revision {policy.revision}")
    if failed:
        _end(_NOT_ALLOWED)


def _explanation(policy: Policy, decision: PolicyDecision) -> Iterator[str]:
    if decision.denied is not None:
        yield f"denied  {decision.principal}  by {decision.denied.label}: {decision.denied.reason}"
        return
    width = max((len(str(name.name)) for name in (*decision.names, *decision.implied)), default=0)
    for name in (*decision.names, *decision.implied):
        if name.rule:
            yield f"allowed      {name.name!s:{width}}  by {name.rule}"
        else:
            yield from _not_allowed(name, compatible=decision.compatible)
    if decision.allowed:
        usages = ", ".join(usage.value for usage in decision.usages)
        yield f"result: allowed with duration {format_duration(decision.duration)} and usages {usages}"
        return
    contradictions = list(decision.contradictions())
    yield from (f"not valid    {fault}" for fault in contradictions)
    if decision.permitted:
        yield "result: not allowed, because the certificate would not be valid"
        return
    if others := [rule.label for rule in policy.rules if rule not in decision.rules]:
        yield f"other rules: {', '.join(others)}"
    yield "result: not allowed, because a certificate contains all requested names"


def _not_allowed(decision: NameDecision, *, compatible: bool) -> Iterator[str]:
    yield f"not allowed  {decision.name}" + ("" if compatible else "  together with the other names")
    for mismatch in decision.mismatches:
        if limits := mismatch.limits or "; ".join(map(str, mismatch.violations)):
            yield f"             {mismatch.rule} allows it only with {limits}"
        else:
            yield f"             {mismatch.rule} has no matching pattern"


def _policy(file: Path, trust_domain: str, cluster_domain: str) -> Policy:
    try:
        return read_policy(_content(file), trust_domain=trust_domain, cluster_domain=cluster_domain)
    except CertmountError as error:
        _end(_UNUSABLE, *(f"{file}: {fault}" for fault in error.faults))


def _table(file: Path) -> PolicyTestTable:
    try:
        located = read_yaml(_content(file), "test table", Reason.INVALID_POLICY)
        return parse_cases(located.data, located.lines)
    except CertmountError as error:
        _end(_UNUSABLE, *(f"{file}: {fault}" for fault in error.faults))


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1)
    except OSError as error:
        _end(_UNUSABLE, f"{file}: cannot be read: {error.strerror}")


def _end(status: int, *texts: str) -> NoReturn:
    for text in texts:
        click.echo(text, err=True)
    raise click.exceptions.Exit(status)
