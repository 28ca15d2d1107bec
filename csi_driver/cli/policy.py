"""``certmount policy``: validate a policy file, explain its decisions, and test them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from csi_driver.authority.config.located_yaml import MAX_BYTES, read_yaml
from csi_driver.authority.policy.policy_file import read_policy
from csi_driver.cli.common import parsed
from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.errors import CertmountError, Reason
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
from csi_driver.core.policy.decision import NameDecision, PolicyDecision
from csi_driver.core.policy.engine import Policy, PolicySubject, RequestedCertificate
from csi_driver.core.policy.test_cases import PolicyTestTable, example_pod, parse_cases, parse_domain
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType, parse_key_type, parse_usage

_MOUNTED_POLICY = "/etc/certmount/policy/policy.yaml"
"""The path in the authority's pod, so that ``kubectl exec deploy/certmount-authority`` needs no option."""
_NOT_ALLOWED, _UNUSABLE = 1, 2
_PATH = click.Path(path_type=Path, dir_okay=False)
_trust_domain = click.option(
    "--trust-domain", default="cluster.local", show_default=True, callback=parsed(parse_trust_domain)
)
_cluster_domain = click.option(
    "--cluster-domain", default="cluster.local", show_default=True, callback=parsed(parse_domain)
)


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
    """Validate FILE and print all faults. The exit status is 1 if there is a fault."""
    try:
        policy = read_policy(_content(file), trust_domain=trust_domain, cluster_domain=cluster_domain)
    except CertmountError as error:
        _end(_NOT_ALLOWED, *(f"{file}: {fault}" for fault in error.faults))
    click.echo(
        f"{file}: valid, {_count(len(policy.rules), 'rule')}, {_count(len(policy.denials), 'denial')}, "
        f"revision {policy.revision}"
    )


@command.command()
@click.option("--file", type=_PATH, default=_MOUNTED_POLICY, show_default=True, help="The policy file.")
@click.option("--namespace", required=True, callback=parsed(parse_dns_label), help="The pod's namespace.")
@click.option(
    "--service-account",
    default="default",
    show_default=True,
    callback=parsed(parse_object_name),
    help="The pod's account.",
)
@click.option(
    "--pod", default="pod", show_default=True, callback=parsed(parse_object_name), help="The pod's name, for {pod}."
)
@click.option(
    "--service", multiple=True, callback=parsed(parse_object_name), help="A Service that selects the pod. Repeatable."
)
@click.option(
    "--namespace-label",
    multiple=True,
    callback=parsed(_label),
    help="A label KEY=VALUE of the pod's namespace. Repeatable.",
)
@click.option("--name", multiple=True, callback=parsed(DNSName.parse), help="A requested DNS name. Repeatable.")
@click.option("--uri", multiple=True, callback=parsed(URI.parse), help="A requested URI. Repeatable.")
@click.option("--ip", multiple=True, callback=parsed(IPAddress.parse), help="A requested IP address. Repeatable.")
@click.option(
    "--email", multiple=True, callback=parsed(EmailAddress.parse), help="A requested email address. Repeatable."
)
@click.option("--key-type", default=KeyType.EC_P256.value, show_default=True, callback=parsed(parse_key_type))
@click.option("--usage", multiple=True, callback=parsed(parse_usage), help="server or client. Repeatable.")
@click.option("--duration", callback=parsed(parse_duration), help="The requested lifetime, such as 1h30m.")
@click.option("--issuer", default=DEFAULT_ISSUER, show_default=True, callback=parsed(parse_dns_label))
@_trust_domain
@_cluster_domain
def explain(file: Path, trust_domain: str, cluster_domain: str, **given: Any) -> None:
    """Explain for each requested name which rule allows it, or why none does. The exit status is 1 if one is not allowed."""
    policy = _policy(file, trust_domain, cluster_domain)
    subject = PolicySubject(
        example_pod(given["namespace"], given["service_account"], given["pod"]),
        dict(given["namespace_label"]),
        given["service"],
    )
    names = Names.of(given["name"], given["uri"], given["ip"], given["email"])
    options = {"usages": given["usage"], "duration": given["duration"], "issuer": given["issuer"]}
    decision = policy.evaluate(subject, RequestedCertificate(names, given["key_type"], **options))
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
    click.echo(f"{_count(len(cases.cases), 'case')}, {failed} failed: {file}, revision {policy.revision}")
    if failed:
        _end(_NOT_ALLOWED)


def _explanation(policy: Policy, decision: PolicyDecision) -> Iterator[str]:
    if decision.denied is not None:
        yield f"denied  {decision.account}  by {decision.denied.label}: {decision.denied.reason}"
        return
    width = max(len(str(name.name)) for name in (*decision.names, *decision.implied))
    for name in (*decision.names, *decision.implied):
        if name.rule:
            yield f"allowed      {name.name!s:{width}}  by {name.rule}"
        else:
            yield from _not_allowed(name, compatible=decision.compatible)
    if decision.allowed:
        usages = ", ".join(usage.value for usage in decision.usages)
        yield f"result: allowed with duration {format_duration(decision.duration)} and usages {usages}"
        return
    if others := [rule.label for rule in policy.rules if rule not in decision.rules]:
        yield f"rules for other pods: {', '.join(others)}"
    yield "result: not allowed, because a certificate contains all requested names"


def _not_allowed(decision: NameDecision, *, compatible: bool) -> Iterator[str]:
    yield f"not allowed  {decision.name}" + ("" if compatible else "  together with the other names")
    for mismatch in decision.mismatches:
        if mismatch.violations:
            yield f"             {mismatch.rule} allows it only with {' and '.join(mismatch.violations)}"
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


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
