"""The demo's output: plain ASCII, with colors only on a terminal."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.core.certificates.keys import key_type_of
from csi_driver.core.durations import format_duration

_INDENT = "   "
_CLEANED_UP = "All processes of the demo have ended, and its directory is deleted."
_MEANINGS = {
    "root.crt": "root certificates to trust",
    "site.crt": "the certificate, then the intermediate that issued it",
    "site.key": "the private key, generated on this node; it never leaves the node",
    "site.pem": "key and certificates in one file, for one atomic read",
}
_USAGES = {ExtendedKeyUsageOID.SERVER_AUTH: "server", ExtendedKeyUsageOID.CLIENT_AUTH: "client"}


class DemoError(Exception):
    """A step of the demo failed. ``logs`` are the last log lines of the programs that can explain it."""

    def __init__(self, text: str, *logs: str) -> None:
        super().__init__(text)
        self.logs = logs


class Output:
    """Writes to standard output, line by line, and counts the steps."""

    def __init__(self) -> None:
        self._steps = 0

    def step(self, text: str) -> None:
        self._steps += 1
        click.secho(f"\n{self._steps}. {text}", bold=True)

    def line(self, text: str, color: str | None = None) -> None:
        click.echo(_INDENT + click.style(text, fg=color))

    def success(self, text: str) -> None:
        self.line(text, "green")

    def code(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.line(line, "cyan")

    def fields(self, fields: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Write each label with its values, one value per line."""
        width = max(len(label) for label, _ in fields)
        for label, values in fields:
            for number, value in enumerate(values):
                styled = click.style(f"{'' if number else label:<{width}}", dim=True)
                click.echo(f"{_INDENT}{styled}  {value}")

    def files(self, directory: Path) -> None:
        """Write name, mode, size and meaning of each file that a pod sees in its volume."""
        files = [(path, path.stat()) for path in sorted(directory.iterdir()) if not path.name.startswith("..")]
        width = max(len(str(status.st_size)) for _, status in files)
        for path, status in files:
            columns = (path.name, stat.filemode(status.st_mode), f"{status.st_size:>{width}} bytes")
            self.line("  ".join((*columns, _MEANINGS.get(path.name, ""))).rstrip())

    def certificate(self, chain: Sequence[x509.Certificate]) -> None:
        """Write the fields of the chain's first certificate, and its issuers."""
        leaf, now = chain[0], datetime.now(UTC).replace(microsecond=0)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        issuers = [each.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value for each in chain]
        key_type, expiry = key_type_of(leaf.public_key()), leaf.not_valid_after_utc
        fingerprint = leaf.fingerprint(SHA256())
        self.fields(
            [
                ("DNS names", names.get_values_for_type(x509.DNSName) or ["none"]),
                ("SPIFFE ID", names.get_values_for_type(x509.UniformResourceIdentifier)),
                ("issued by", [str(issuer) for issuer in issuers]),
                ("valid", [f"until {expiry:%Y-%m-%d %H:%M:%S} UTC, for {format_duration(expiry - now)}"]),
                ("key type", [key_type.value if key_type else "unknown"]),
                ("usages", [", ".join(_USAGES.get(usage, usage.dotted_string) for usage in usages)]),
                ("serial", [f"{leaf.serial_number:x}"]),
                ("SHA-256", [fingerprint[:16].hex(":"), fingerprint[16:].hex(":")]),
            ]
        )

    def failed(self, error: DemoError) -> None:
        click.secho(f"\nThe demo failed: {error}", fg="red", bold=True, err=True)
        click.echo("\n".join([*error.logs, _CLEANED_UP]), err=True)

    def stopped(self) -> None:
        click.secho(f"\nStopped. {_CLEANED_UP}", err=True)
