"""``certmount ca``: show the CA and rotate it without an outage."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.keyring import (
    AUTHORITY_KEY_TYPES,
    INTERMEDIATE,
    INTERMEDIATE_KEY,
    ROOT,
    ROOT_KEY,
    Keyring,
    make_keyring,
    profile_of,
)
from csi_driver.authority.ca.keyring_loader import load_keyring
from csi_driver.authority.ca.report import CAStatusReport
from csi_driver.authority.ca.rotation import RotationPhase
from csi_driver.authority.ca.sources import StoredCA, missing_ca
from csi_driver.authority.ca.state import CAState
from csi_driver.authority.storage import DirectoryStore
from csi_driver.authority.trust.acknowledgements import (
    ACKNOWLEDGEMENTS_FILE,
    ACKNOWLEDGEMENTS_SECRET,
    AcknowledgementStore,
    NodeList,
    acknowledgements,
)
from csi_driver.cli.common import echo_report, errors_for_users, option, parse_namespaced_name
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.cluster.objects import ClusterNodes
from csi_driver.core.secret import Secret
from csi_driver.telemetry.logging import configure_logging

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_KEY_TYPES = {key_type.value: key_type for key_type in AUTHORITY_KEY_TYPES}
_DEFAULT_SECRET = ("certmount", "certmount-ca")
_FILE_OPTIONS = {ROOT: "root", ROOT_KEY: "root_key", INTERMEDIATE: "intermediate", INTERMEDIATE_KEY: "intermediate_key"}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _StoredState:
    """A CA in a store, and the acknowledgements and nodes that its rotation waits for."""

    ca: StoredCA
    acknowledgements: AcknowledgementStore
    nodes: NodeList

    async def read(self) -> CAState:
        state = await self.ca.read(utc_now())
        if state is None:
            raise missing_ca(self.ca.name)
        return state

    async def report(self, state: CAState) -> CAStatusReport:
        waiting = state.rotation.phase.before_switch
        nodes = await self.nodes.list() if waiting else ClusterNodes(frozenset(), frozenset())
        stored = await self.acknowledgements.read()
        return CAStatusReport(state, acknowledgements(nodes, stored, state.rotation.generation), int(time.time()))


class _UnknownNodes:
    """Outside a cluster, only the authority knows which nodes are connected."""

    async def list(self) -> ClusterNodes:
        return ClusterNodes(frozenset(), None)


_Action = Callable[[_StoredState], Awaitable[_T]]
_Run = Callable[[_Action[Any]], Any]


def _with_ca(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that select the CA, and pass ``run``, which runs an action on that CA."""
    directory = click.Path(path_type=Path, exists=True, file_okay=False)
    secret_help = "The Secret with the CA, as NAMESPACE/NAME. Default in a cluster: certmount/certmount-ca."

    @option("--ca-secret", secret_help, parse_namespaced_name)
    @click.option("--ca-dir", type=directory, help="The directory with the CA, outside a cluster.")
    @functools.wraps(command)
    def wrapped(ca_secret: tuple[str, str] | None, ca_dir: Path | None, **options: Any) -> None:
        command(lambda action: _run(ca_secret, ca_dir, action), **options)

    return wrapped


@click.group(name="ca")
def command() -> None:
    """Show the CA, and rotate it without an outage (docs/rotation.md)."""


@command.command()
@_with_ca
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", show_default=True)
def status(run: _Run, output: str) -> None:
    """Show which CA signs, until when each root is trusted, and what a rotation waits for."""

    async def read(stored: _StoredState) -> CAStatusReport:
        return await stored.report(await stored.read())

    _print(run(read), output)


@command.command()
@_with_ca
@click.option("--root", type=_FILE, help="The root certificates (PEM) of your own next CA.")
@click.option("--root-key", type=_FILE, help="The key of its root. Omit it if you keep it offline.")
@click.option("--intermediate", type=_FILE, help="Its signing certificate, followed by its chain up to the root.")
@click.option("--intermediate-key", type=_FILE, help="The key of its signing certificate.")
@click.option("--password-file", type=_FILE, help="The password of its encrypted keys.")
@click.option("--key-type", type=click.Choice(list(_KEY_TYPES)), help="The key type of a new CA.")
@option(
    "--permit",
    "Names that a new CA can sign, for example dns:example.com or ip:10.0.0.0/8. Repeatable. Default: all names.",
    parse_constraint,
    multiple=True,
)
@click.option("--path-length", type=click.IntRange(1, 8), help="The path length of a new CA's root.")
def rotate(run: _Run, **options: Any) -> None:
    """Start to replace the CA, or resume after a stop. There is no outage. It takes as long as the longest certificate lifetime."""
    own, profile = _own_ca(options), _profile_changes(options)

    def step(state: CAState) -> CAState:
        if state.rotation.phase is RotationPhase.STEADY:
            next_keyring = own or make_keyring(utc_now(), replace(profile_of(state.keyring), **profile))
            return state.begin_rotation(next_keyring, int(time.time()))
        if own or profile:
            problem = "a rotation to another CA is in progress; to abandon it, run: certmount ca stop --discard"
            raise click.ClickException(problem)
        return replace(state, rotation=rotation.resume(state.rotation))

    async def change(stored: _StoredState) -> tuple[CAState, CAStatusReport]:
        before = await stored.read()
        return before, await stored.report(await stored.ca.change(utc_now(), step))

    before, report = run(change)
    if before.rotation.phase is RotationPhase.STEADY:
        click.echo("Rotation started. Pods keep working; certificates are renewed at their usual time.")
    elif before.rotation.stopped:
        click.echo("Rotation resumed.")
    else:
        click.echo("A rotation is already in progress; nothing changed.")
    _print(report)


@command.command(name="stop")
@_with_ca
@click.option("--discard", is_flag=True, help="Also abandon the next CA. Possible until it signs.")
def stop_command(run: _Run, discard: bool) -> None:
    """Stop a rotation in its current phase: the same CA keeps signing, and all trusted roots stay trusted."""
    if not discard:
        _change(
            run, lambda state, _: replace(state, rotation=rotation.stop(state.rotation)), "The rotation is stopped."
        )
        return
    message = (
        "The next CA is abandoned. It has signed nothing, and nodes remove its root from every root.crt within seconds."
    )
    _change(run, lambda state, now: state.discard_next(now), message)


@command.command()
@_with_ca
@click.confirmation_option(prompt="Pods will reject every certificate of the former CA. Drop its root?")
def drop(run: _Run) -> None:
    """Remove the former root from every root.crt now, even if its certificates are in use. For a CA whose key was stolen."""
    _change(
        run,
        lambda state, now: replace(state, rotation=rotation.drop_retired(state.rotation, now)),
        "Nodes remove the former root from every root.crt within seconds.",
    )


@command.command()
@_with_ca
@click.argument("nodes", nargs=-1, required=True, metavar="NODE...")
def forget(run: _Run, nodes: tuple[str, ...]) -> None:
    """Don't wait for nodes that no longer exist. A rotation still waits for every node on which the driver runs."""

    async def remove(stored: _StoredState) -> list[bool]:
        return [await stored.acknowledgements.forget(node) for node in nodes]

    for node, known in zip(nodes, run(remove), strict=True):
        click.echo(f"{node}: {'forgotten' if known else 'unknown; it has never acknowledged any roots'}")


def _change(run: _Run, step: Callable[[CAState, int], CAState], message: str) -> None:
    async def change(stored: _StoredState) -> CAStatusReport:
        return await stored.report(await stored.ca.change(utc_now(), lambda state: step(state, int(time.time()))))

    report = run(change)
    click.echo(message)
    _print(report)


def _print(report: CAStatusReport, output: str = "text") -> None:
    echo_report(output, report.document(), report.lines())


def _profile_changes(options: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a new CA that differ from the current CA."""
    changes = {
        "key_type": _KEY_TYPES.get(options["key_type"] or ""),
        "permitted": options["permit"],
        "path_length": options["path_length"],
    }
    return {name: value for name, value in changes.items() if value}


def _own_ca(options: dict[str, Any]) -> Keyring | None:
    """Return the next CA if the administrator provides one."""
    files = {name: options[option] for name, option in _FILE_OPTIONS.items() if options[option]}
    password_file = options["password_file"]
    if not files:
        if password_file:
            raise click.UsageError("--password-file: requires your own CA; see --root")
        return None
    if _profile_changes(options):
        raise click.UsageError("--key-type, --permit and --path-length apply to a new CA; don't use them with --root")
    if missing := [name for name in (ROOT, INTERMEDIATE, INTERMEDIATE_KEY) if name not in files]:
        flags = ", ".join("--" + _FILE_OPTIONS[name].replace("_", "-") for name in missing)
        raise click.UsageError(f"your own CA also requires {flags}")
    values = {name: Secret(file.read_bytes()) for name, file in files.items()}
    password = Secret(password_file.read_bytes().rstrip(b"\r\n")) if password_file else None
    with errors_for_users():
        keyring = load_keyring(values, utc_now(), where="next", password=password, hint="check the file of this option")
    # The authority has no password for its store, which must be as well protected as a password.
    return replace(keyring, source={}, encrypted=False)


def _run(ca_secret: tuple[str, str] | None, ca_dir: Path | None, action: _Action[_T]) -> _T:
    configure_logging("warning")

    async def run() -> _T:
        async with _open(ca_secret, ca_dir) as stored:
            return await action(stored)

    with errors_for_users():
        return asyncio.run(run())


@contextlib.asynccontextmanager
async def _open(ca_secret: tuple[str, str] | None, ca_dir: Path | None) -> AsyncIterator[_StoredState]:
    if ca_secret and ca_dir:
        raise click.UsageError("--ca-secret is for a cluster and --ca-dir for use outside a cluster; use one of them")
    if ca_dir:
        acknowledged = AcknowledgementStore(DirectoryStore(ca_dir, ACKNOWLEDGEMENTS_FILE), lambda: 0)
        yield _StoredState(StoredCA(DirectoryStore(ca_dir)), acknowledged, _UnknownNodes())
        return
    if not ca_secret and "KUBERNETES_SERVICE_HOST" not in os.environ:
        raise click.UsageError("--ca-dir: required outside a cluster")
    from csi_driver.kube.client import ObjectName
    from csi_driver.kube.connection import Api, in_cluster_configuration
    from csi_driver.kube.stored_objects import SecretStore
    from csi_driver.kube.uncached_reads import CSINodeClient

    namespace, name = ca_secret or _DEFAULT_SECRET
    async with Api(in_cluster_configuration()) as api:
        ca = SecretStore(api, ObjectName("Secret", namespace, name))
        stored = SecretStore(api, ObjectName("Secret", namespace, ACKNOWLEDGEMENTS_SECRET))
        yield _StoredState(StoredCA(ca), AcknowledgementStore(stored, lambda: 0), CSINodeClient(api))
