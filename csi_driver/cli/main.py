"""The ``certmount`` command. Imports a subcommand only when it runs, so the node driver never loads the authority's packages."""

from __future__ import annotations

import os
from importlib import import_module

import click

from csi_driver import __version__

# Otherwise gRPC writes its own lines between the lines of the log: at INFO, one whenever a server closes a connection.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

_COMMANDS = {
    "node": "csi_driver.cli.node",
    "authority": "csi_driver.cli.authority",
    "ca": "csi_driver.cli.ca",
    "issuer": "csi_driver.cli.issuer",
    "policy": "csi_driver.cli.policy",
    "secrets": "csi_driver.cli.secrets",
    "status": "csi_driver.cli.status",
    "doctor": "csi_driver.cli.doctor",
    "inspect": "csi_driver.cli.inspect",
    "demo": "csi_driver.cli.demo",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # click's signature
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(_COMMANDS[cmd_name]).command
        return command


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="certmount")
def main() -> None:
    """Give every Kubernetes pod a TLS certificate in files, and rotate it in place."""


if __name__ == "__main__":
    main()
