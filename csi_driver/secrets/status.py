"""The Secrets that the sources request, and the state of their certificates, read from the API server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from csi_driver.core.errors import CertmountError, printable
from csi_driver.core.texts import shortened, timestamp
from csi_driver.kube.client import ObjectName
from csi_driver.kube.connection import Api
from csi_driver.kube.tls_secrets.secret_client import SecretClient
from csi_driver.secrets.manager import READY
from csi_driver.secrets.requests import DesiredSecret
from csi_driver.secrets.settings import SecretsSettings
from csi_driver.secrets.source_table import SourceTable
from csi_driver.secrets.source_watches import source_watches, wait_for_sources

_MAX_REQUESTS = 8
_MAX_NAMES = 60  # characters of names in the table


@dataclass(frozen=True, slots=True)
class SecretStatus:
    """A row of the table."""

    namespace: str
    secret: str
    names: tuple[str, ...]
    issuer: str
    expires: str  # RFC 3339; empty without a certificate of certmount
    state: str  # ready, expired, failed, missing, not managed or unknown
    reason: str  # of a failure
    source: str


async def read_status(api: Api, settings: SecretsSettings) -> Sequence[SecretStatus]:
    """Read all sources and the metadata of their Secrets, with the permissions of the controller."""
    failed: list[SecretStatus] = []
    table = SourceTable(
        lambda _: None,
        lambda target, error: failed.append(
            SecretStatus(target.namespace, "", (), "", "", "failed", str(error), f"{target.kind}/{target.name}")
        ),
    )
    watches = source_watches(api, settings, table)
    tasks = [asyncio.create_task(watch.run()) for watch in watches]
    try:
        await wait_for_sources(watches)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    client, places = SecretClient(api), asyncio.Semaphore(_MAX_REQUESTS)

    async def read(desired: DesiredSecret) -> SecretStatus:
        async with places:
            return await _status(client, desired)

    found = [desired for secret in sorted(table.secrets()) if (desired := table.desired(secret)) is not None]
    return [*await asyncio.gather(*map(read, found)), *failed]


async def _status(client: SecretClient, desired: DesiredSecret) -> SecretStatus:
    secret, target = desired.secret, desired.targets[0]
    expires, state, reason = "", "missing", f"see the events of {target}"
    try:
        metadata = await client.metadata(ObjectName("Secret", secret.namespace, secret.name))
    except CertmountError as error:
        state, reason = "unknown", str(error)
    else:
        if metadata is not None:
            expires, condition = metadata.annotations.get("not-after", ""), metadata.annotations.get("condition", "")
            state, reason = ("ready", "") if condition == READY else ("failed", condition)
            if state == "ready" and expires <= timestamp(time.time()):  # the condition stays if the controller stops
                state, reason = "expired", "see the log of the Secrets controller"
            if not metadata.managed:
                state, reason = "not managed", "certmount did not create it"
    names = tuple(map(str, desired.names))
    source = f"{target.kind}/{target.name}"
    return SecretStatus(secret.namespace, secret.name, names, desired.options.issuer, expires, state, reason, source)


def render_table(rows: Sequence[SecretStatus]) -> Iterator[str]:
    """Yield the lines of a table."""
    cells = [("NAMESPACE", "SECRET", "NAMES", "ISSUER", "EXPIRES", "STATE", "SOURCE", "REASON")]
    for row in rows:
        short = shortened(",".join(row.names), _MAX_NAMES)
        texts = (row.namespace, row.secret, short, row.issuer, row.expires, row.state, row.source, row.reason)
        cells.append(tuple(printable(text) or "-" for text in texts))  # type: ignore[arg-type]  # as many as the header
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)]
    for line in cells:
        yield "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]])
