"""What ``certmount status`` and ``certmount doctor`` read from a node driver, as JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from csi_driver import __version__
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.parsing import PARSE_ERRORS
from csi_driver.core.errors import CertmountError
from csi_driver.core.texts import timestamp
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import read_contents

_MAX_NAMES = 10
"""Of a certificate. Tenants choose them, and 250 pods can have certificates of 64 KiB."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """Reads the state of the driver; ``problems`` are those of its readiness, ``connect`` connects to the authority."""

    node_name: str
    store: VolumeStore
    volumes: VolumeTable
    renewals: Renewals
    problems: Callable[[], Sequence[str]]
    connect: Callable[[], Awaitable[str]]

    async def document(self) -> dict[str, Any]:
        """Return the state of the driver and of all its volumes."""
        return {
            "version": __version__,
            "time": time.time(),
            "node": self.node_name,
            "problems": list(self.problems()),
            "certificates": [await self._certificate(volume) for volume in self.volumes],
        }

    async def diagnose(self) -> dict[str, Any]:
        """Return the problems of the readiness, and the result of a connection to the authority."""
        problems = list(self.problems())
        try:
            authority = await self.connect()
        except CertmountError as error:
            problems.append(str(error))
            authority = ""
        return {"version": __version__, "time": time.time(), "problems": problems, "authority": authority}

    async def _certificate(self, volume: Volume) -> dict[str, Any]:
        record, leaf, problem = volume.record, None, self.renewals.problem(volume)
        condition = {"reason": problem.reason, "message": problem.message} if problem else None
        try:
            contents = await in_thread(None, read_contents, self.store.files_dir(record.volume_id))
            leaf = contents.chain[0] if contents.chain else None
        except CertmountError as error:
            condition = condition or {"reason": error.reason.word, "message": str(error)}
        names = _names(leaf) if leaf else []
        return {
            "namespace": record.pod_namespace,
            "pod": record.pod_name,
            "volume": _volume_name(record.targets),
            "node": self.node_name,
            "names": names[:_MAX_NAMES],
            "moreNames": len(names[_MAX_NAMES:]),
            "serial": f"{leaf.serial_number:x}" if leaf else "",
            "issuer": volume.spec.issuer,
            "interim": record.interim,
            "notAfter": _time(record.not_after),
            "nextRenewal": _time(self.renewals.scheduler.due(record.volume_id) or record.renew_at),
            "condition": condition,
        }


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        return [str(name) for name in names_of(leaf.extensions)]
    except PARSE_ERRORS:
        return []


def _volume_name(targets: Sequence[str]) -> str:
    """Return the name in the pod spec: a target path is ``pods/UID/volumes/kubernetes.io~csi/NAME/mount``."""
    return Path(targets[0]).parent.name if targets else ""


def _time(seconds: float) -> str:
    """Return the time, or an empty text for the volume's if it has no certificate."""
    return "" if seconds == math.inf else timestamp(seconds)
