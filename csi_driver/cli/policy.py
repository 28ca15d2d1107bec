"""``certmount policy``: is the file right, who gets what by it and why, and does it decide as its administrator says."""

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
from csi_driver.core.policy.test_cases import PolicyTestTable, parse_cases, parse_domain, pod
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType, parse_key_type, parse_usage

_IN_THE_CLUSTER = "/etc/certmount/policy/policy.yaml"
"""Where the authority's pod has it, so that ``kubectl exec deploy/certmount-authority`` needs no option."""
_NO, _UNUSABLE = 1, 2
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
@click.argument("file", type=_PATH, default=_IN_THE_CLUSTER)
@_trust_domain
@_cluster_domain
def check(file: Path, trust_domain: str, cluster_domain: str) -> None:
    """Say all that is wrong with FILE; exit 1 if anything is."""
    try:
        policy = read_policy(_content(file), trust_domain=trust_domain, cluster_domain=cluster_domain)
    except CertmountError as error:
        _end(_NO, *(f"{file}: {fault}" for fault in error.faults))
    click.echo(
        f"{file}: valid, {_count(len(policy.rules), 'rule')}, {_count(len(policy.denials), 'denial')}, "
        f"revision {policy.revision}"
    )


@command.command()
@click.option("--file", type=_PATH, default=_IN_THE_CLUSTER, show_default=True, help="The policy.")
@click.option("--namespace", required=True, callback=parsed(parse_dns_label), help="Of the pod.")
@click.option(
    "--service-account", default="default", show_default=True, callback=parsed(parse_object_name), help="Of the pod."
)
@click.option(
    "--pod", default="pod", show_default=True, callback=parsed(parse_object_name), help="The pod's name, for {pod}."
)
@click.option(
    "--service", multiple=True, callback=parsed(parse_object_name), help="A Service that selects the pod; repeatable."
)
@click.option(
    "--namespace-label",
    multiple=True,
    callback=parsed(_label),
    help="KEY=VALUE of the pod's namespace; repeatable.",
)
@click.option("--name", multiple=True, callback=parsed(DNSName.parse), help="A DNS name it asks for; repeatable.")
@click.option("--uri", multiple=True, callback=parsed(URI.parse), help="A URI; repeatable.")
@click.option("--ip", multiple=True, callback=parsed(IPAddress.parse), help="An IP address; repeatable.")
@click.option("--email", multiple=True, callback=parsed(EmailAddress.parse), help="An e-mail address; repeatable.")
@click.option("--key-type", default=KeyType.EC_P256.value, show_default=True, callback=parsed(parse_key_type))
@click.option("--usage", multiple=True, callback=parsed(parse_usage), help="server or client; repeatable.")
@click.option("--duration", callback=parsed(parse_duration), help="Such as 1h30m.")
@click.option("--issuer", default=DEFAULT_ISSUER, show_default=True, callback=parsed(parse_dns_label))
@_trust_domain
@_cluster_domain
def explain(file: Path, trust_domain: str, cluster_domain: str, **given: Any) -> None:
    """Say whether a pod may have what it asks for, name by name, and by which rule; exit 1 if not."""
    policy = _policy(file, trust_domain, cluster_domain)
    subject = PolicySubject(
        pod(given["namespace"], given["service_account"], given["pod"]),
        dict(given["namespace_label"]),
        given["service"],
    )
    names = Names.of(given["name"], given["uri"], given["ip"], given["email"])
    asked = RequestedCertificate(names, given["key_type"], given["usage"], given["duration"], given["issuer"])
    verdict = policy.judge(subject, asked)
    for line in _told(policy, verdict):
        click.echo(line)
    if not verdict.allowed:
        _end(_NO)


@command.command()
@click.argument("table", metavar="FILE", type=_PATH)
def test(table: Path) -> None:
    """Hold the cases of FILE against the policy that it names; exit 1 if one is decided otherwise."""
    cases = _table(table)
    file = table.parent / cases.policy
    policy = _policy(file, cases.trust_domain, cases.cluster_domain)
    failed = 0
    for case in cases.cases:
        failure = case.failure(policy)
        if failure is not None:
            failed += 1
            click.echo(f"FAILED {case} {failure}")
    click.echo(f"{_count(len(cases.cases), 'case')}, {failed} failed: {file}, revision {policy.revision}")
    if failed:
        _end(_NO)


def _told(policy: Policy, verdict: PolicyDecision) -> Iterator[str]:
    if verdict.denied is not None:
        yield f"refused  {verdict.account} is denied by {verdict.denied.label}: {verdict.denied.reason}"
        return
    width = max(len(str(judged.name)) for judged in (*verdict.names, *verdict.implied))
    for judged in (*verdict.names, *verdict.implied):
        if judged.rule:
            yield f"allowed  {judged.name!s:{width}}  by {judged.rule}"
        else:
            yield from _refused(judged, together=verdict.together)
    if verdict.allowed:
        usages = ", ".join(usage.value for usage in verdict.usages)
        yield f"granted for {format_duration(verdict.duration)}, usages {usages}"
        return
    if others := [rule.label for rule in policy.rules if rule not in verdict.rules]:
        yield f"not for this pod: {', '.join(others)}"
    yield "refused: a pod gets all that it asks for, or nothing"


def _refused(judged: NameDecision, *, together: bool) -> Iterator[str]:
    yield f"refused  {judged.name}" + ("" if together else "  together with the other names")
    for objection in judged.objections:
        if objection.obstacles:
            yield f"         {objection.rule} allows it only with {' and '.join(objection.obstacles)}"
        else:
            yield f"         {objection.rule} has no pattern that fits"


def _policy(file: Path, trust_domain: str, cluster_domain: str) -> Policy:
    try:
        return read_policy(_content(file), trust_domain=trust_domain, cluster_domain=cluster_domain)
    except CertmountError as error:
        _end(_UNUSABLE, *(f"{file}: {fault}" for fault in error.faults))


def _table(file: Path) -> PolicyTestTable:
    try:
        located = read_yaml(_content(file), "table of cases", Reason.INVALID_POLICY)
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
