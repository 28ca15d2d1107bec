"""The issuers of the authority: the internal CA, and the external issuers that the issuers file declares."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import structlog

from csi_driver.authority.config.watched_file import Contents, WatchedFile, read_file
from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.dependencies import IssuerDependencies, IssuerKind
from csi_driver.authority.issuers.kinds import ISSUER_KINDS, make_issuer, read_issuers
from csi_driver.config.located_yaml import MAX_BYTES
from csi_driver.core.config.issuers import IssuerDeclaration
from csi_driver.core.errors import Reason
from csi_driver.core.spec import DEFAULT_ISSUER

log = structlog.get_logger(__name__)

_INTERVAL_S = 1.0  # Between checks of the file and the roots. The kubelet updates a ConfigMap within about a minute.
_RESTART_AFTER_S = 30.0
_External = dict[IssuerDeclaration, Issuer]


@dataclass(eq=False)
class IssuerRegistry(Mapping[str, Issuer]):
    """Issuers by name. If a declaration does not change, its issuer stays the same object when the file is reloaded.

    ``on_roots`` gets a name and roots (X.509 DER, never empty) when they become known or change. It is not called for a
    removed issuer, whose pods keep their roots. ``on_load`` gets whether new content of the file was accepted.
    """

    file: Path | None
    internal: Issuer
    dependencies: IssuerDependencies
    _: KW_ONLY
    on_roots: Callable[[str, tuple[bytes, ...]], None]
    on_load: Callable[[bool], None]
    on_due: Callable[[frozenset[str], frozenset[str]], None]  # Gets `renewals_due` and `keys_to_replace` every second
    kinds: Mapping[str, IssuerKind] = field(default_factory=lambda: ISSUER_KINDS)

    def __post_init__(self) -> None:
        self._external: _External = {}
        self._by_name: dict[str, Issuer] = {}
        self._reported: dict[str, tuple[bytes, ...]] = {}
        self._watched: WatchedFile[_External] | None = None
        if (file := self.file) is not None:

            def read() -> Contents:
                return {str(file): read_file(file, MAX_BYTES, Reason.INVALID_ISSUERS, "check --issuers")}

            reject = functools.partial(self.on_load, False)
            self._watched = WatchedFile("issuers file", read, self._parse, on_change=self._replace, on_rejected=reject)

    def __getitem__(self, name: str) -> Issuer:
        return self.internal if name == DEFAULT_ISSUER else self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        yield DEFAULT_ISSUER
        yield from self._by_name

    def __len__(self) -> int:
        return 1 + len(self._by_name)

    @property
    def problems(self) -> Mapping[str, str | None]:
        return {name: issuer.problem for name, issuer in self._by_name.items()}

    @property
    def environments(self) -> Mapping[str, str]:
        return {name: issuer.environment for name, issuer in self.items()}

    @property
    def sharing(self) -> frozenset[str]:
        return frozenset(name for name, issuer in self._by_name.items() if issuer.shares_certificates)

    @property
    def renewals_due(self) -> frozenset[str]:
        return frozenset(key for issuer in self._by_name.values() for key in issuer.renewals_due())

    @property
    def keys_to_replace(self) -> frozenset[str]:
        return frozenset(key for issuer in self._by_name.values() for key in issuer.keys_to_replace())

    def external(self) -> list[Issuer]:
        return list(self._by_name.values())

    async def load(self) -> None:
        """Read the file; raise CertmountError InvalidIssuers if new content is invalid. The previous issuers then stay."""
        if self._watched is not None:
            await self._watched.load()

    async def run(self) -> None:
        running: dict[int, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                current = {id(issuer): (name, issuer) for name, issuer in self._by_name.items()}
                for key in running.keys() - current.keys():
                    running.pop(key).cancel()
                for key in current.keys() - running.keys():
                    running[key] = tasks.create_task(_run_issuer(*current[key]), name=f"issuer {current[key][0]}")
                self._report_roots()
                self.on_due(self.renewals_due, self.keys_to_replace)
                await asyncio.sleep(_INTERVAL_S)
                if self._watched is not None:
                    await self._watched.refresh()

    def _parse(self, contents: Contents) -> _External:
        (content,) = contents.values()
        make, known = functools.partial(make_issuer, dependencies=self.dependencies, kinds=self.kinds), self._external
        # An unchanged issuer keeps its connections and its state.
        return {one: known.get(one) or make(one) for one in read_issuers(content, self.kinds)}

    def _replace(self, external: _External) -> None:
        self._external = external
        self._by_name = {declared.name: issuer for declared, issuer in external.items()}
        self._reported = {name: roots for name, roots in self._reported.items() if name in self._by_name}
        self.on_load(True)
        log.info("issuers loaded", issuers=sorted(self._by_name))

    def _report_roots(self) -> None:
        for name, issuer in self._by_name.items():
            roots = issuer.roots
            if roots and roots != self._reported.get(name):
                self._reported[name] = roots
                self.on_roots(name, roots)


async def _run_issuer(name: str, issuer: Issuer) -> None:
    """Restart the background work of an issuer after an unexpected error, which must not stop the other issuers."""
    while True:
        try:
            await issuer.run()
        except Exception:  # the log shows whatever it is
            log.exception("background work of issuer failed", issuer=name)
        await asyncio.sleep(_RESTART_AFTER_S)
