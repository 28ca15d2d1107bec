"""Where a CA comes from: a store, in which it is made and rotated, or files that others write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import Protocol

import structlog

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.keyring import DEFAULT_PROFILE, CAProfile, Keyring, make_keyring
from csi_driver.authority.ca.rotation import RotationPhase, RotationState
from csi_driver.authority.ca.state import CAState, new_ca_state, parse_ca_state
from csi_driver.authority.storage import Store, ca_part
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import fingerprint

log = structlog.get_logger(__name__)

_MOST_CONFLICTS = 10
_ANY_LIFE = 2**53
_LOOK_S = 10.0
"""Short against STALE_S, which goes by meanwhile."""
_UNKNOWN = frozenset({"unknown"})
"""Stands for nodes that nobody can ask for: they have not confirmed."""


class NodeAcknowledgements(Protocol):
    """Whoever knows the nodes."""

    async def look(self, generation: int) -> tuple[frozenset[str], frozenset[str]]:
        """The nodes that have confirmed this generation of the CA's roots, and those that must; raises CertmountError."""


class CASource(Protocol):
    """Gives the CA as it is now. ``name`` is what errors call it."""

    name: str

    async def refresh(self, now: datetime) -> CAState:
        """The CA, after all that was due; raises CertmountError."""

    async def record_lifetime(self, now: datetime, seconds: float) -> CAState:
        """The CA, once it is written that it gives certificates of such a life; raises CertmountError."""


class StoredCA:
    """A CA in a store. What the store holds wrongly is never overwritten."""

    def __init__(
        self, store: Store, fleet: NodeAcknowledgements | None = None, design: CAProfile = DEFAULT_PROFILE
    ) -> None:
        """Without a fleet no rotation gets as far as its switch. ``design`` is that of the CA that is made where there is none."""
        self.name = store.name
        self._store = ca_part(store)
        self._fleet = fleet
        self._design = design
        self._held: CAState | None = None
        self._version = ""
        self._known: RootSet | None = None

    async def refresh(self, now: datetime) -> CAState:
        async def due(holdings: CAState) -> CAState:
            return await self._advanced(holdings.renewed(now), now)

        return await self._change(now, due, make=True)

    async def record_lifetime(self, now: datetime, seconds: float) -> CAState:
        async def admitted(holdings: CAState) -> CAState:
            return replace(holdings, state=rotation.record_lifetime(holdings.state, seconds))

        return await self._change(now, admitted)

    async def look_up(self, now: datetime) -> CAState:
        """What is stored, with nothing done about it; raises CertmountError, also InvalidCA where nothing is stored yet."""
        stored = await self._store.load()
        if not stored.values:
            raise self._empty()
        return parse_ca_state(stored.values, now, where=self.name)

    async def change(self, now: datetime, step: Callable[[CAState], CAState]) -> CAState:
        """Does what a person wants; raises CertmountError, also what ``step`` raises."""

        async def stepped(holdings: CAState) -> CAState:
            return step(holdings)

        return await self._change(now, stepped)

    async def _change(
        self, now: datetime, step: Callable[[CAState], Awaitable[CAState]], *, make: bool = False
    ) -> CAState:
        for _ in range(_MOST_CONFLICTS):
            stored = await self._store.load()
            if self._held is not None and stored.version == self._version:
                found = self._held
            elif stored.values:
                found = parse_ca_state(stored.values, now, where=self.name, known=self._known)
            elif make:
                found = new_ca_state(make_keyring(now, self._design), int(now.timestamp()), self._known)
            else:
                raise self._empty()
            after = await step(found)
            if after == found and after.saved:
                return self._hold(found, stored.version)
            # Whoever loses the race goes by what the winner saved: so it is loaded again, never held unsaved.
            if await self._store.save(after.dump(), stored):
                _tell(self.name, found, after)
                return self._hold(replace(after, saved=True), "")
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, f"{self.name}: other writers came first again and again")

    async def _advanced(self, holdings: CAState, now: datetime) -> CAState:
        confirmed, expected = frozenset[str](), _UNKNOWN
        if (
            holdings.state.phase is RotationPhase.DISTRIBUTING
            and not holdings.state.stopped
            and self._fleet is not None
        ):
            try:
                async with asyncio.timeout(_LOOK_S):
                    confirmed, expected = await self._fleet.look(holdings.state.generation)
            except CertmountError as error:
                log.warning("rotation waits: the nodes cannot be asked for", reason=error.reason.word, error=str(error))
            except TimeoutError:
                log.warning("rotation waits: the nodes cannot be asked for", error=f"no answer in {_LOOK_S:g} s")
        return holdings.advanced(int(now.timestamp()), confirmed, expected)

    def _empty(self) -> CertmountError:
        hint = (
            "an authority makes one when it first starts. One with --ca-files keeps none; there put both roots into root.crt, "
            "exchange intermediate.crt and intermediate.key when all pods have them, and take the former root away when "
            "the last certificate of it has ended"
        )
        return CertmountError(Reason.INVALID_CA, Fault(self.name, "keeps no CA", hint))

    def _hold(self, holdings: CAState, version: str) -> CAState:
        self._held, self._version, self._known = holdings, version, holdings.trust
        return holdings


class FileCA:
    """A CA in files: no state is kept, as nobody here decides what is trusted or who signs."""

    def __init__(self, files: CAFiles) -> None:
        self.name = files.name
        self._files = files
        self._held: CAState | None = None

    async def refresh(self, now: datetime) -> CAState:
        keyring = await self._files.refresh(now)
        held = self._held
        if held is None or held.keyring is not keyring:
            self._held = held = _from_files(keyring, held, int(now.timestamp()))
        return held

    async def record_lifetime(self, now: datetime, seconds: float) -> CAState:  # noqa: ARG002  # any is admitted
        return await self.refresh(now)


def _from_files(keyring: Keyring, before: CAState | None, now: int) -> CAState:
    generation = before.state.generation if before else 0
    if before is None or set(before.keyring.roots_der) != set(keyring.roots_der):
        generation = rotation.next_generation(generation, now)
    return CAState(keyring, None, RotationState(RotationPhase.STEADY, generation, since=now, longest_life=_ANY_LIFE))


def _tell(store: str, before: CAState, after: CAState) -> None:
    if after.keyring != before.keyring or not before.saved:
        ends = f"{after.keyring.intermediate.certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
        log.info(
            "certificate authority saved",
            store=store,
            root=fingerprint(after.keyring.root),
            intermediate=ends,
        )
    if after.state.phase is not before.state.phase:
        log.info("rotation", phase=after.state.phase.value, generation=after.state.generation)
