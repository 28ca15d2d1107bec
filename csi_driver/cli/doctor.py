"""``certmount doctor``: check an installation from outside, with the kubeconfig of an administrator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from csi_driver.cli.common import echo_report
from csi_driver.cli.report import cluster_options, color, output_option, with_cluster
from csi_driver.core.texts import count
from csi_driver.doctor.findings import CheckResult, Severity

_COLORS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.UNKNOWN: "yellow"}
_WIDTH = 18


@click.command(name="doctor")
@cluster_options
@output_option
def command(namespace: str, context: str | None, output: str) -> None:
    """Check an installation, and print for each finding how to fix it. The exit status is 1 after an error or a check that was not possible."""

    async def run(reader: Any) -> Sequence[CheckResult]:
        from csi_driver.doctor.doctor import examine
        from csi_driver.doctor.installation import Installation

        return await examine(Installation(reader, namespace))

    results = with_cluster(context, run)
    healthy = all(finding.severity is Severity.WARNING for result in results for finding in result.findings)
    document = {"healthy": healthy, "checks": [result.document() for result in results]}
    echo_report(output, document, _lines(results))
    if not healthy:
        raise click.exceptions.Exit(1)


def _lines(results: Sequence[CheckResult]) -> Iterator[str]:
    counts = dict.fromkeys(Severity, 0)
    for result in results:
        if not result.findings:
            yield f"{color('ok'.ljust(7), 'green')} {result.check.ljust(_WIDTH)} {result.summary}"
        for finding in result.findings:
            counts[finding.severity] += 1
            severity = color(finding.severity.value.ljust(7), _COLORS[finding.severity])
            yield f"{severity} {finding.check.ljust(_WIDTH)} {finding.problem}"
            yield f"{'':{_WIDTH + 8}} fix: {finding.fix}"
    errors, warnings, unknown = counts.values()
    yield f"{count(errors, 'error')}, {count(warnings, 'warning')}, {unknown} not checked"
