"""``certmount inspect``: what is in a volume, and what a client will think of its certificate."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import click

from csi_driver.cli.common import echo_report, errors_for_users, parse_namespaced_name
from csi_driver.cli.report import cluster_options, color, output_option, table, with_cluster
from csi_driver.core.errors import printable
from csi_driver.core.secret import Secret
from csi_driver.doctor.volume import InspectedVolume
from csi_driver.doctor.volume_files import read_volume

_MAX_CPU_S = 20
"""A key store can contain a number of iterations that would take years."""
_KILLED_AFTER_S = 3
"""After the signal, whose handler does not run during a call of a library, such as the derivation of a key."""


@click.command(name="inspect")
@click.argument("volume", metavar="DIR|NAMESPACE/POD")
@click.option(
    "--name",
    "names",
    multiple=True,
    help="A name that clients connect to. Repeatable. Default: those of the certificate.",
)
@click.option(
    "--password-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The password of the key stores. Default: the file in the volume.",
)
@click.option(
    "--kubelet-dir", type=click.Path(path_type=Path, readable=False), default="/var/lib/kubelet", show_default=True,
    help="The kubelet's directory, for a pod on this machine.",
)  # fmt: skip
@cluster_options
@output_option
def command(
    volume: str,
    names: Sequence[str],
    password_file: Path | None,
    kubelet_dir: Path,
    namespace: str,
    context: str | None,
    output: str,
) -> None:
    """Show the files of a volume, whether they fit together, and whether clients accept the certificate. Exit status 1: a problem.

    For a pod, also show its events and what the driver of its node reports; its files, if the command runs on that node.
    Keys and passwords are never printed.
    """
    password = Secret(password_file.read_bytes().rstrip(b"\r\n")) if password_file else None
    if volume.startswith(("/", ".")) or os.path.exists(volume):  # noqa: PTH110  # as below
        document = _inspect(Path(volume), names, password)
        lines = _volume_lines(document)
    else:
        document = _inspect_pod(volume, names, password, kubelet_dir, namespace, context)
        lines = _pod_lines(document)
    echo_report(output, document, lines)
    if document["problems"]:
        raise click.exceptions.Exit(1)


def _inspect(directory: Path, names: Sequence[str], password: Secret[bytes] | None) -> dict[str, Any]:
    _limit_cpu()
    with errors_for_users():
        generation, files = read_volume(directory, password)
    return InspectedVolume(str(directory), generation, files, names, datetime.now(UTC)).document()


def _inspect_pod(
    pod: str,
    names: Sequence[str],
    password: Secret[bytes] | None,
    kubelet_dir: Path,
    namespace: str,
    context: str | None,
) -> dict[str, Any]:
    try:
        pod_namespace, pod_name = parse_namespaced_name(pod)
    except ValueError:
        raise click.BadParameter(f"{pod!r} is neither a directory nor NAMESPACE/POD") from None

    async def run(reader: Any) -> dict[str, Any]:
        from csi_driver.doctor.pod import read_pod

        return await read_pod(reader, namespace, pod_namespace, pod_name)

    document = with_cluster(context, run)
    for volume in document["volumes"]:
        path = kubelet_dir / "pods" / document["uid"] / "volumes" / "kubernetes.io~csi" / volume["name"] / "mount"
        volume["files"] = _inspect(path, names, password) if os.path.isdir(path) else None  # noqa: PTH112  # also without permission
        document["problems"] += (volume["files"] or {}).get("problems", ())
    return document


def _volume_lines(volume: Mapping[str, Any]) -> Iterator[str]:
    generation = volume["generation"]
    yield f"{printable(volume['directory'])}{f' (generation {generation})' if generation else ''}"
    yield ""
    rows = [(f["name"], f["mode"], f"{f['uid']}:{f['gid']}", f["kind"], f["problem"] or "ok") for f in volume["files"]]
    yield from table(("FILE", "MODE", "OWNER", "CONTENT", "STATE"), rows)
    yield ""
    if (leaf := volume["certificate"]) is not None:
        fields = {
            "subject": leaf["subject"],
            "names": ", ".join(leaf["names"]),
            "serial": leaf["serial"],
            "issuer": leaf["issuer"],
            "valid": f"{leaf['notBefore']} to {leaf['notAfter']}",
            "renewal": leaf["renewAt"] or "unknown",
            "key": f"{leaf['keyType']}, for {' and '.join(leaf['usages']) or 'any use'}",
        }
        yield from (f"{name:<13} {printable(str(text)) or '-'}" for name, text in fields.items())
    for role in ("intermediates", "roots"):
        for each in volume[role]:
            yield f"{role[:-1]:<13} {printable(each['subject'])}, until {each['notAfter']}, {each['fingerprint']}"
    yield ""
    for verdict in volume["verdicts"]:
        accepts = verdict["accepts"]
        state = (
            color("accepts it", "green")
            if accepts
            else f"{color('rejects it', 'red')}: {printable(verdict['problem'])}"
        )
        yield f"{printable(verdict['peer'])} {state}"
    if not volume["verdicts"]:
        yield "no handshake was tested; it needs the certificate, its private key, the roots, and permission to read them"
    yield from _problem_lines(volume["problems"])


def _pod_lines(pod: Mapping[str, Any]) -> Iterator[str]:
    where = f"on {pod['node']}" if pod["node"] else "on no node"
    yield f"pod {pod['namespace']}/{pod['pod']} {where}, service account {pod['serviceAccount']}, {pod['phase']}"
    for volume in pod["volumes"]:
        yield f"volume {volume['name']}"
        yield from (f"  {key}: {printable(text)}" for key, text in volume["attributes"].items())
        if (certificate := volume["certificate"]) is not None:
            names = printable(", ".join(certificate["names"]))
            yield f"  certificate {certificate['serial']} of issuer {certificate['issuer']} for {names}"
            yield f"  valid until {certificate['notAfter']}, next renewal {certificate['nextRenewal']}"
        if volume["files"] is not None:
            yield from (f"  {line}".rstrip() for line in _volume_lines(volume["files"]))
    for event in pod["events"]:
        yield f"event {event['time']} {event['type']} {event['reason']}: {printable(event['message'])}"
    yield from _problem_lines(pod["problems"])


def _problem_lines(problems: Sequence[str]) -> Iterator[str]:
    yield from (f"{color('problem:', 'red')} {printable(problem)}" for problem in problems)


def _limit_cpu() -> None:
    """End the process if the files of a volume need too much CPU time."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise click.ClickException(f"the files need more than {_MAX_CPU_S} s of CPU time")

    signal.signal(signal.SIGXCPU, end)
    _, given = resource.getrlimit(resource.RLIMIT_CPU)
    hard = _MAX_CPU_S + _KILLED_AFTER_S
    if given != resource.RLIM_INFINITY:
        hard = min(hard, given)
    resource.setrlimit(resource.RLIMIT_CPU, (min(_MAX_CPU_S, hard), hard))
