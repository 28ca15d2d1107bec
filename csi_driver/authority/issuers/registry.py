"""The issuers there are now: the internal CA, and those of the administrator's file, which is followed and never replaced by a worse one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import structlog

from csi_driver.authority.config.located_yaml import MAX_BYTES
from csi_driver.authority.config.watched_file import Contents, WatchedFile, read_file
from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.external import ExternalIssuer, Http01Responder, RenewalAdvisor
from csi_driver.authority.issuers.kinds import (
    ISSUER_KINDS,
    IssuerDependencies,
    IssuerKind,
    make_issuer,
    read_issuers,
)
from csi_driver.core.config.issuers import IssuerDeclaration
from csi_driver.core.errors import Reason
from csi_driver.core.spec import DEFAULT_ISSUER

log = structlog.get_logger(__name__)

_CHECK_S = 1.0
"""Between looks at the file and at what roots the issuers have; a volume's file changes a minute after its ConfigMap."""
_DEFECT_PAUSE_S = 30.0


class IssuersFile(Mapping[str, Issuer]):
    """Issuers by name. An issuer whose entry does not change stays the same object through all reloads.

    ``on_roots`` gets an issuer's name and its roots (X.509 DER), never none: when they are known and whenever they are
    others. An issuer that is gone is not told of, as its pods go on with the certificates and roots that they have.
    ``on_load`` gets whether a new content of the file was taken, ``on_due`` every second what :attr:`due` is.
    """

    def __init__(
        self,
        file: Path | None,
        internal: Issuer,
        tools: IssuerDependencies,
        *,
        on_roots: Callable[[str, tuple[bytes, ...]], None],
        on_load: Callable[[bool], None],
        on_due: Callable[[frozenset[str]], None],
        kinds: Mapping[str, IssuerKind] = ISSUER_KINDS,
    ) -> None:
        self._internal = internal
        self._tools = tools
        self._on_roots = on_roots
        self._on_load = on_load
        self._on_due = on_due
        self._kinds = kinds
        self._watched = _watched(file, kinds, self._use, lambda: on_load(False)) if file else None
        self._external: dict[IssuerDeclaration, ExternalIssuer] = {}
        self._by_name: dict[str, ExternalIssuer] = {}
        self._told: dict[str, tuple[bytes, ...]] = {}

    def __getitem__(self, name: str) -> Issuer:
        return self._internal if name == DEFAULT_ISSUER else self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        yield DEFAULT_ISSUER
        yield from self._by_name

    def __len__(self) -> int:
        return 1 + len(self._by_name)

    @property
    def problems(self) -> Mapping[str, str | None]:
        """Of each issuer of the file, why it can't issue now; None where it can. May be called from any thread."""
        return {name: issuer.problem for name, issuer in self._by_name.items()}

    @property
    def sharing(self) -> frozenset[str]:
        """Those of which pods of one service account on one node are to share a certificate."""
        return frozenset(name for name, issuer in self._by_name.items() if issuer.shares_certificates)

    @property
    def due(self) -> frozenset[str]:
        """The keys (as :meth:`RenewalAdvisor.due`) whose certificates are to be renewed now."""
        return frozenset(
            key for issuer in self._by_name.values() if isinstance(issuer, RenewalAdvisor) for key in issuer.due()
        )

    def answering(self) -> list[Http01Responder]:
        """Those that a CA may ask over HTTP."""
        return [issuer for issuer in self._by_name.values() if isinstance(issuer, Http01Responder)]

    async def load(self) -> None:
        """Read the file if its content changed; raise CertmountError InvalidIssuers as :meth:`WatchedFile.load` does."""
        if self._watched is not None:
            await self._watched.load()

    async def run(self) -> None:
        """Follows the file, and does the background work of the issuers, for ever."""
        running: dict[int, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                now = {id(issuer): (name, issuer) for name, issuer in self._by_name.items()}
                for mark in running.keys() - now.keys():
                    running.pop(mark).cancel()
                for mark in now.keys() - running.keys():
                    running[mark] = tasks.create_task(_kept_running(*now[mark]), name=f"issuer {now[mark][0]}")
                self._tell_roots()
                self._on_due(self.due)
                await asyncio.sleep(_CHECK_S)
                if self._watched is not None:
                    await self._watched.refresh()

    def _use(self, declarations: Iterable[IssuerDeclaration]) -> None:
        self._external = {declared: self._kept(declared) for declared in declarations}
        self._by_name = {declared.name: issuer for declared, issuer in self._external.items()}
        self._told = {name: roots for name, roots in self._told.items() if name in self._by_name}
        self._on_load(True)
        log.info("issuers loaded", issuers=sorted(self._by_name))

    def _kept(self, declared: IssuerDeclaration) -> ExternalIssuer:
        """The issuer that there is for an entry already, with its connections and all it knows; else a new one."""
        return self._external.get(declared) or make_issuer(declared, self._tools, self._kinds)

    def _tell_roots(self) -> None:
        for name, issuer in self._by_name.items():
            roots = issuer.roots
            if roots and roots != self._told.get(name):
                self._told[name] = roots
                self._on_roots(name, roots)


async def _kept_running(name: str, issuer: ExternalIssuer) -> None:
    """A defect of one issuer is no outage of the others."""
    while True:
        try:
            await issuer.run()
        except Exception:  # what it is can't be known: the point is to be told of it
            log.exception("the background work of an issuer failed", issuer=name)
        await asyncio.sleep(_DEFECT_PAUSE_S)


def _watched(
    file: Path,
    kinds: Mapping[str, IssuerKind],
    on_change: Callable[[Iterable[IssuerDeclaration]], None],
    on_rejected: Callable[[], None],
) -> WatchedFile[Iterable[IssuerDeclaration]]:
    def read() -> Contents:
        return {"": read_file(file, MAX_BYTES, Reason.INVALID_ISSUERS, "see --issuers")}

    def parse(contents: Contents) -> Iterable[IssuerDeclaration]:
        return read_issuers(contents[""], kinds)

    return WatchedFile("issuers file", read, parse, on_change=on_change, on_rejected=on_rejected)
