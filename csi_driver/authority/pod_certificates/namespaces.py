"""Write the root sets into a ConfigMap in each namespace with a label, for pods that have no other access to the roots."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import encode_der_certificates

log = structlog.get_logger(__name__)

_SUFFIX = ".crt"
_INTERVAL_S = 10.0
_REPAIR_S = 600.0
"""How often a ConfigMap is written although the roots did not change, and a write is repeated that failed."""


class RootConfigMapWriter(Protocol):
    """ConfigMaps at the API server."""

    async def write(self, namespace: str, data: Mapping[str, str | None]) -> None:
        """Create or update the ConfigMap of a namespace. None removes a key, and a key that is not named stays.

        Raises CertmountError IssuerUnavailable.
        """


@dataclass(frozen=True, slots=True)
class _Written:
    revision: int  # of the data
    at: float
    error: str = ""


@dataclass(eq=False)
class NamespaceRoots:
    """Writes while this replica is the leader. A namespace without permissions delays no other one."""

    writer: RootConfigMapWriter
    trust: TrustBundles
    labelled: Callable[[], Iterable[str]]  # returns the namespaces that have the label now
    configured: Callable[[str], bool]
    """Returns whether there is a root set of a name. Its key stays while its roots are not known, as after a restart."""
    clock: Callable[[], float] = time.monotonic
    _written: dict[str, _Written] = field(default_factory=dict)
    _data: Mapping[str, str | None] = field(default_factory=dict)
    _revision: int = 0

    async def run(self) -> None:
        while True:
            await self.publish()
            await asyncio.sleep(_INTERVAL_S)

    async def publish(self) -> None:
        """Write the ConfigMaps that are due."""
        data: dict[str, str | None] = {
            key: content if self.configured(key.removesuffix(_SUFFIX)) else None for key, content in self._data.items()
        }
        for name, roots in self.trust.snapshot.sets.items():
            data[name + _SUFFIX] = encode_der_certificates(roots.roots).decode("ascii")
        if data != self._data:
            self._data, self._revision = data, self._revision + 1
        namespaces = sorted(self.labelled()) if data else []
        labelled = frozenset(namespaces)
        self._written = {name: done for name, done in self._written.items() if name in labelled}
        for namespace in namespaces:
            done = self._written.get(namespace)
            if done is None or done.revision != self._revision or self.clock() - done.at >= _REPAIR_S:
                self._written[namespace] = await self._write(namespace, done)

    async def _write(self, namespace: str, before: _Written | None) -> _Written:
        try:
            await self.writer.write(namespace, self._data)
        except CertmountError as error:
            text = str(error)
            if before is None or before.error != text:
                log.warning("roots not written", namespace=namespace, error=text)
            return _Written(self._revision, self.clock(), text)
        if before is None or before.revision != self._revision or before.error:
            log.info("roots written", namespace=namespace)
        return _Written(self._revision, self.clock())
