"""``certmount ca``: look at the CA, exchange it without an outage, stop that, go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

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
from csi_driver.authority.ca.rotation import RotationPhase, resume, stop
from csi_driver.authority.ca.rotation import drop as drop_roots
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.ca.state import CAState
from csi_driver.authority.storage import DirectoryStore
from csi_driver.authority.trust.acknowledgements import (
    ACKNOWLEDGEMENTS_FILE,
    ACKNOWLEDGEMENTS_SECRET,
    AcknowledgementStore,
    NodeList,
    judge,
)
from csi_driver.cli.ca_report import CAStatusReport
from csi_driver.cli.common import namespaced, parsed
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.cluster.nodes import ClusterNodes
from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret
from csi_driver.telemetry.logging import configure_logging

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_KEY_TYPES = {key_type.value: key_type for key_type in AUTHORITY_KEY_TYPES}
_DEFAULT_SECRET = ("certmount", "certmount-ca")
_OWN = {ROOT: "root", ROOT_KEY: "root_key", INTERMEDIATE: "intermediate", INTERMEDIATE_KEY: "intermediate_key"}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a CA is kept, and what is known of the nodes there."""

    ca: StoredCA
    confirmations: AcknowledgementStore
    nodes: NodeList

    async def report(self, holdings: CAState) -> CAStatusReport:
        marks = await self.confirmations.read()
        nodes = (
            await self.nodes.list() if holdings.state.phase.before_switch else ClusterNodes(frozenset(), frozenset())
        )
        return CAStatusReport(holdings, *judge(nodes, marks, holdings.state.generation), int(time.time()))


class _Unconnected:
    """Outside of a cluster only the authority knows who is connected."""

    async def list(self) -> ClusterNodes:
        return ClusterNodes(frozenset(), None)


def _placed(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which CA is meant."""
    folder = click.Path(path_type=Path, exists=True, file_okay=False)
    secret_help = "NAMESPACE/NAME of the Secret that keeps the CA; in a cluster certmount/certmount-ca, else none."
    command = click.option("--ca-dir", type=folder, help="Outside a cluster: the folder that keeps the CA.")(command)
    return click.option("--ca-secret", callback=parsed(namespaced), help=secret_help)(command)


@click.group(name="ca")
def command() -> None:
    """Look at the CA, and exchange it without an outage (docs/rotation.md)."""


@command.command()
@_placed
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", show_default=True)
def status(ca_secret: tuple[str, str] | None, ca_dir: Path | None, output: str) -> None:
    """Tell which CA signs, which roots are trusted until when, and what a rotation waits for."""

    async def look(place: _Place) -> CAStatusReport:
        return await place.report(await place.ca.look_up(utc_now()))

    _tell(_run(ca_secret, ca_dir, look), output)


@command.command()
@_placed
@click.option("--root", type=_FILE, help="A next CA of your own: its root certificates, PEM.")
@click.option("--root-key", type=_FILE, help="Its root's key; leave it away if it is kept offline.")
@click.option("--intermediate", type=_FILE, help="Its signing certificate, and what leads from there to the root.")
@click.option("--intermediate-key", type=_FILE, help="Its signing key.")
@click.option("--password-file", type=_FILE, help="What its keys are encrypted with.")
@click.option(
    "--key-type", type=click.Choice(list(_KEY_TYPES)), help="Else, of the CA that is made: the kind of its keys."
)
@click.option(
    "--permit",
    multiple=True,
    callback=parsed(parse_constraint),
    help="The only names it may sign, such as dns:example.com or ip:10.0.0.0/8; repeatable.",
)
@click.option("--path-length", type=click.IntRange(1, 8), help="How many intermediates its root allows.")
def rotate(ca_secret: tuple[str, str] | None, ca_dir: Path | None, **options: Any) -> None:
    """Begin to exchange the CA, or go on after a stop. Nothing is interrupted; it takes from minutes to as long as certificates live."""
    own, design = _own(options), _design(options)

    def step(holdings: CAState) -> CAState:
        if holdings.state.phase is RotationPhase.STEADY:
            # What is not said stays as it is: names that the CA may not sign, the kind of its keys.
            following = own or make_keyring(utc_now(), replace(profile_of(holdings.keyring), **design))
            return holdings.begun(following, int(time.time()))
        if own or design:
            raise click.ClickException(
                "a rotation to another CA is under way; give that one up first by: certmount ca stop --discard"
            )
        return replace(holdings, state=resume(holdings.state))

    async def act(place: _Place) -> tuple[CAState, CAStatusReport]:
        before = await place.ca.look_up(utc_now())
        return before, await place.report(await place.ca.change(utc_now(), step))

    before, report = _run(ca_secret, ca_dir, act)
    if before.state.phase is RotationPhase.STEADY:
        click.echo("The rotation has begun. No pod notices; certificates are renewed when they would have been.")
    elif before.state.stopped:
        click.echo("The rotation goes on.")
    else:
        click.echo("A rotation is under way already; nothing was changed.")
    _tell(report)


@command.command(name="stop")
@_placed
@click.option("--discard", is_flag=True, help="Give the next CA up; possible until it signs.")
def stop_command(ca_secret: tuple[str, str] | None, ca_dir: Path | None, discard: bool) -> None:
    """Hold a rotation where it is: all that is trusted stays trusted, and the same CA goes on to sign."""

    def step(holdings: CAState) -> CAState:
        if discard:
            return holdings.discarded(int(time.time()))
        return replace(holdings, state=stop(holdings.state))

    async def act(place: _Place) -> CAStatusReport:
        return await place.report(await place.ca.change(utc_now(), step))

    report = _run(ca_secret, ca_dir, act)
    click.echo(
        "The next CA is given up: it has signed nothing, and its root leaves every root.crt within seconds."
        if discard
        else "The rotation is stopped."
    )
    _tell(report)


@command.command()
@_placed
@click.confirmation_option(prompt="Every certificate of the former CA is refused from then on. Drop its root?")
def drop(ca_secret: tuple[str, str] | None, ca_dir: Path | None) -> None:
    """Take the former root out of every root.crt now, though certificates of it are in use. For a CA whose key was stolen."""

    def step(holdings: CAState) -> CAState:
        return replace(holdings, state=drop_roots(holdings.state, int(time.time())))

    async def act(place: _Place) -> CAStatusReport:
        return await place.report(await place.ca.change(utc_now(), step))

    report = _run(ca_secret, ca_dir, act)
    click.echo("The former root leaves every root.crt within seconds.")
    _tell(report)


@command.command()
@_placed
@click.argument("nodes", nargs=-1, required=True, metavar="NODE...")
def forget(ca_secret: tuple[str, str] | None, ca_dir: Path | None, nodes: tuple[str, ...]) -> None:
    """Wait no longer for nodes that had the driver once and never will again. One with the driver is still waited for."""

    async def act(place: _Place) -> list[bool]:
        return [await place.confirmations.forget(node) for node in nodes]

    for node, known in zip(nodes, _run(ca_secret, ca_dir, act), strict=True):
        click.echo(f"{node}: {'forgotten' if known else 'has never confirmed anything, so there is nothing to forget'}")


def _tell(report: CAStatusReport, output: str = "text") -> None:
    if output == "json":
        click.echo(json.dumps(report.document(), indent=2))
    else:
        click.echo("\n".join(report.lines()))


def _design(options: dict[str, Any]) -> dict[str, Any]:
    """What the user wants otherwise of the CA that is made."""
    wanted = {"key_type": _KEY_TYPES.get(options["key_type"] or ""), "permitted": options["permit"]}
    return {name: value for name, value in {**wanted, "path_length": options["path_length"]}.items() if value}


def _own(options: dict[str, Any]) -> Keyring | None:
    """The next CA where the user brings one."""
    files = {name: options[option] for name, option in _OWN.items() if options[option]}
    password_file = options["password_file"]
    if not files:
        if password_file:
            raise click.UsageError("--password-file is for a CA of your own; see --root")
        return None
    if _design(options):
        problem = "--key-type, --permit and --path-length are for a CA that is made, --root is for your own"
        raise click.UsageError(problem)
    if missing := [name for name in (ROOT, INTERMEDIATE, INTERMEDIATE_KEY) if name not in files]:
        flags = ", ".join("--" + _OWN[name].replace("_", "-") for name in missing)
        raise click.UsageError(f"a CA of your own also needs {flags}")
    values = {name: Secret(file.read_bytes()) for name, file in files.items()}
    password = Secret(password_file.read_bytes().rstrip(b"\r\n")) if password_file else None
    try:
        keyring = load_keyring(values, utc_now(), where="next", password=password, hint="see its option")
    except CertmountError as error:
        raise click.ClickException(str(error)) from None
    # The authority has no password for what lies in its store, which is as secret as the password would be.
    return replace(keyring, source={}, encrypted=False)


def _run(ca_secret: tuple[str, str] | None, ca_dir: Path | None, act: Callable[[_Place], Awaitable[_T]]) -> _T:
    configure_logging("warning")

    async def run() -> _T:
        async with _place(ca_secret, ca_dir) as place:
            return await act(place)

    try:
        return asyncio.run(run())
    except CertmountError as error:
        raise click.ClickException(str(error)) from None


@contextlib.asynccontextmanager
async def _place(ca_secret: tuple[str, str] | None, ca_dir: Path | None) -> AsyncIterator[_Place]:
    if ca_secret and ca_dir:
        raise click.UsageError("--ca-secret is for a cluster, --ca-dir for the outside of one; give one or the other")
    if ca_dir:
        confirmations = AcknowledgementStore(DirectoryStore(ca_dir, ACKNOWLEDGEMENTS_FILE), lambda: 0)
        yield _Place(StoredCA(DirectoryStore(ca_dir)), confirmations, _Unconnected())
        return
    if not ca_secret and "KUBERNETES_SERVICE_HOST" not in os.environ:
        raise click.UsageError("--ca-dir: needed outside a cluster")
    from csi_driver.kube.client import ObjectName, connect, in_cluster_configuration
    from csi_driver.kube.csi_nodes import CsiNodes
    from csi_driver.kube.secret_store import SecretStore

    namespace, name = ca_secret or _DEFAULT_SECRET
    async with connect(in_cluster_configuration()) as api:
        store = SecretStore(api, ObjectName("Secret", namespace, name))
        known = SecretStore(api, ObjectName("Secret", namespace, ACKNOWLEDGEMENTS_SECRET))
        yield _Place(StoredCA(store), AcknowledgementStore(known, lambda: 0), CsiNodes(api))
