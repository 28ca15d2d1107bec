"""``certmount status``: the certificates of all pods, and the state of the authority and the node drivers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from csi_driver.cli.common import echo_report
from csi_driver.cli.report import cluster_options, color, output_option, table, with_cluster
from csi_driver.core.errors import printable
from csi_driver.core.texts import count

if TYPE_CHECKING:
    from csi_driver.doctor.status import InstallationStatus, StatusProblem


@click.command(name="status")
@click.argument("selection", metavar="[POD_NAMESPACE[/POD]]", default="")
@click.option("--problems", "only_problems", is_flag=True, help="Show only what is wrong.")
@cluster_options
@output_option
def command(selection: str, only_problems: bool, namespace: str, context: str | None, output: str) -> None:
    """Show problems, the authority, the CA, issuers, root sets, nodes and certificates. The exit status is 1 if there are problems.

    Reads the pages of certmount's own pods as `kubectl port-forward` does, so it needs no permission on Secrets.
    """
    pod_namespace, _, pod = selection.partition("/")

    def selected(certificate: Mapping[str, Any]) -> bool:
        return pod_namespace in ("", certificate["namespace"]) and pod in ("", certificate["pod"])

    async def run(reader: Any) -> InstallationStatus:
        from csi_driver.doctor.installation import Installation
        from csi_driver.doctor.status import read_installation_status

        return await read_installation_status(Installation(reader, namespace), selected)

    status = with_cluster(context, run)
    problems = list(status.problems())
    document, lines = status.document(), _problem_lines(problems)
    if only_problems:
        document = {"problems": document["problems"]}
    else:
        lines = itertools.chain(lines, _state_lines(status))
    echo_report(output, document, lines)
    if problems:
        raise click.exceptions.Exit(1)


def _problem_lines(problems: Sequence[StatusProblem]) -> Iterator[str]:
    yield color(f"problems: {len(problems)}", "red" if problems else "green")
    for each in problems:
        yield f"  {printable(each.subject)}: {printable(each.problem)}"


def _state_lines(status: InstallationStatus) -> Iterator[str]:
    authority, pages = status.authority, status.authorities
    yield f"authority: {_ready(pages)}, version {_versions(pages)}, policy {_policy(authority.get('policy'))}"
    yield f"node drivers: {_ready(status.nodes)}, version {_versions(status.nodes)}, {len(status.connected)} connected"
    if ca := authority.get("ca"):
        yield from _ca_lines(ca)
    yield ""
    rows = [(each["name"], each["environment"], each["problem"] or "ok") for each in authority.get("issuers") or ()]
    yield from table(("ISSUER", "ENVIRONMENT", "STATE"), rows)
    yield ""
    sets = [
        (each["name"], str(each["generation"]), root["fingerprint"], root["notAfter"])
        for each in authority.get("rootSets") or ()
        for root in each["roots"]
    ]
    yield from table(("ROOT SET", "GENERATION", "ROOT", "NOT AFTER"), sets)
    yield ""
    header = ("NAMESPACE", "POD", "VOLUME", "STATE", "NOT AFTER", "NEXT RENEWAL", "ISSUER", "NODE", "NAMES", "SERIAL")
    yield from table(header, [_row(each) for each in status.certificates])


def _row(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    more = f",+{certificate['moreNames']}" if certificate["moreNames"] else ""
    healthy = "interim" if certificate["interim"] else "ok"
    state = certificate["condition"]["reason"] if certificate["condition"] else healthy
    place = [str(certificate[key]) for key in ("namespace", "pod", "volume")]
    texts = [str(certificate[key]) for key in ("notAfter", "nextRenewal", "issuer", "node")]
    return (*place, state, *texts, ",".join(certificate["names"]) + more, str(certificate["serial"]))


def _ca_lines(ca: Mapping[str, Any]) -> Iterator[str]:
    if "error" in ca:
        yield f"CA: {ca['error']}"
        return
    stopped = " (stopped)" if ca["stopped"] else ""
    intermediate = ca["signing"]["intermediate"]["notAfter"]
    yield f"CA: {ca['phase']}{stopped}, its intermediate expires at {intermediate}, next step: {ca['nextStep']}"


def _ready(pages: Any) -> str:
    return f"{sum(page.pod.ready for page in pages)} of {len(pages)} ready"


def _versions(pages: Any) -> str:
    return ", ".join(sorted({str(page.document["version"]) for page in pages if page.document})) or "unknown"


def _policy(policy: Mapping[str, Any] | None) -> str:
    return f"{policy['revision']} with {count(policy['rules'], 'rule')}" if policy else "not loaded"
