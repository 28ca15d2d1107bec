"""Where the internal CA comes from: the protocol of a CA source, and a CA in a store that certmount creates and rotates."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import Protocol

import structlog

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.keyring import DEFAULT_PROFILE, CAProfile, make_keyring
from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.ca.state import CAState, new_ca_state, parse_ca_state
from csi_driver.authority.storage import Store, Values, ca_part, update
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.secret import StoredSecrets
from csi_driver.core.texts import timestamp

log = structlog.get_logger(__name__)

_NODES_TIMEOUT_S = 10.0  # short compared with MAX_STATE_AGE_S: the replica can't refresh the state meanwhile
_UNKNOWN_NODES = Acknowledgements(frozenset(), frozenset({"unknown"}))
"""Prevents the switch while it is not known which nodes there are."""


class NodeAcknowledgements(Protocol):
    """Knows which nodes have acknowledged the CA's roots."""

    async def read(self, generation: int) -> Acknowledgements:
        """Return the nodes that have acknowledged this generation, and those that must; raise CertmountError."""


class CASource(Protocol):
    """Provides the CA: its roots, intermediates and signing key (:class:`~csi_driver.authority.ca.certificates.CAKeyPair`).

    Add a key store that signs elsewhere, such as PKCS#11 or Vault, as another source. All methods raise CertmountError.
    """

    name: str  # the name of the source in errors

    @property
    def valid(self) -> bool:
        """False while the newest content is not valid, and an earlier CA is returned instead of an error."""

    @property
    def unacknowledged(self) -> int:
        """The number of nodes whose acknowledgement the rotation waited for at the last refresh."""

    async def refresh(self, now: datetime, steady: datetime | None = None) -> CAState:
        """Return the current CA; first create it, renew it and advance its rotation if that is due.

        ``steady`` is the time of a clock that is never stepped. What is due must be due by both clocks.
        """

    async def read(self, now: datetime) -> CAState | None:
        """Return the current CA without changing anything; None if there is none yet."""

    async def record_lifetime(self, now: datetime, seconds: float) -> CAState:
        """Record that the CA signs certificates with this lifetime, and return the current CA."""


class StoredCA:
    """A CA in a store. Invalid content of the store is never overwritten."""

    valid = True  # invalid content is an error

    def __init__(
        self, store: Store, nodes: NodeAcknowledgements | None = None, profile: CAProfile = DEFAULT_PROFILE
    ) -> None:
        """Without ``nodes``, a rotation never switches to the next CA. A new CA is created with ``profile``."""
        self.name = store.name
        self.unacknowledged = 0
        self._store = ca_part(store)
        self._nodes = nodes
        self._profile = profile
        self._current: CAState | None = None
        self._version: str | None = None
        """The version that ``_current`` was read from; None if it was just saved."""
        self._published: RootSet | None = None

    async def refresh(self, now: datetime, steady: datetime | None = None) -> CAState:
        earliest, latest = sorted((now, steady or now))

        async def step(ca: CAState) -> CAState:
            # A clock that was stepped ahead must not replace an intermediate by one that is valid in the future only.
            ca = ca.renew_intermediates(earliest)
            return await self._advance(ca, int(earliest.timestamp()), int(latest.timestamp()))

        return await self._update(now, step, create=True)

    async def read(self, now: datetime) -> CAState | None:
        stored = await self._store.load()
        return parse_ca_state(stored.values, now, where=self.name) if stored.values else None

    async def record_lifetime(self, now: datetime, seconds: float) -> CAState:
        return await self.change(now, lambda ca: replace(ca, rotation=rotation.record_lifetime(ca.rotation, seconds)))

    async def change(self, now: datetime, step: Callable[[CAState], CAState]) -> CAState:
        """Save what ``step`` returns for the current CA.

        Raises CertmountError InvalidCA if there is no CA yet, or what ``step`` or the store raises.
        """

        async def stepped(ca: CAState) -> CAState:
            return step(ca)

        return await self._update(now, stepped)

    async def _update(
        self, now: datetime, step: Callable[[CAState], Awaitable[CAState]], *, create: bool = False
    ) -> CAState:
        async def apply(stored: StoredSecrets) -> tuple[Values | None, tuple[CAState, CAState, str | None]]:
            before = self._parse(stored, now, create=create)
            after = await step(before)
            if after == before and after.saved:
                return None, (before, after, stored.version)
            return after.encode(), (before, replace(after, saved=True), None)

        before, after, self._version = await update(self._store, apply)
        if self._version is None:
            _log_change(self.name, before, after)
        self._current, self._published = after, after.root_set
        return after

    def _parse(self, stored: StoredSecrets, now: datetime, *, create: bool) -> CAState:
        if self._current is not None and stored.version == self._version:
            return self._current
        if stored.values:
            return parse_ca_state(stored.values, now, where=self.name, published=self._published)
        if not create:
            raise missing_ca(self.name)
        return new_ca_state(make_keyring(now, self._profile), int(now.timestamp()), self._published)

    async def _advance(self, ca: CAState, earliest: int, latest: int) -> CAState:
        nodes = _UNKNOWN_NODES
        if ca.rotation.waits_for_nodes and self._nodes is not None:
            try:
                async with asyncio.timeout(_NODES_TIMEOUT_S):
                    nodes = await self._nodes.read(ca.rotation.generation)
            except CertmountError as error:
                log.warning("node acknowledgements not read", reason=error.reason.word, error=str(error))
            except TimeoutError:
                log.warning("node acknowledgements not read", error=f"no response within {_NODES_TIMEOUT_S:g} s")
        self.unacknowledged = len(nodes.missing) if ca.rotation.waits_for_nodes else 0
        return ca.advance(earliest, nodes, latest=latest)


def missing_ca(store: str) -> CertmountError:
    """Return the error for a store without a CA."""
    hint = (
        "an authority creates one when it first starts. With --ca-files there is nothing to rotate here: add the new "
        "root to root.crt, replace intermediate.crt and intermediate.key when all pods have the new root, and remove "
        "the former root when the last certificate of the former intermediate has expired"
    )
    return CertmountError(Reason.INVALID_CA, Fault(store, "contains no CA", hint))


def _log_change(store: str, before: CAState, after: CAState) -> None:
    if after.keyring != before.keyring or not before.saved:
        log.info(
            "CA saved",
            store=store,
            root=fingerprint(after.keyring.root),
            intermediate_not_after=timestamp(after.keyring.intermediate.certificate.not_valid_after_utc),
        )
    if after.rotation.phase is not before.rotation.phase:
        log.info("CA rotation phase changed", phase=after.rotation.phase.value, generation=after.rotation.generation)
