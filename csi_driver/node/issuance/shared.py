"""Certificates that pods of one service account on this node share, as their issuer counts each one.

Twenty pods of a Deployment that start at once ask once, and a pod that crashes and comes back takes what there is: public
CAs give the same names a handful of certificates a week. Each volume still has files of its own, with its own group.

Why a pod may have what another one asked for: policy goes by the service account and its namespace, both are the same, and
the kubelet vouches for them (the pod's token, which a first publish must bring, is checked to be that pod's). Rules that
go by a pod's name or Services bound the same people, who name and label their pods as they like. What is taken back later,
by the deny list or a new policy, ends with the next renewal: one that is refused ends the sharing, too.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol

from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.certificates.root_sets import RootSet, newest_root_sets, trusted_root_set_names
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.renewal import plan_renewal
from csi_driver.core.spec import DEFAULT_ISSUER, CertificateSpec
from csi_driver.node.issuance.enrolled import Enrolled, Wanted

_MOST = 1_000
"""Certificates held; a node runs a few hundred pods."""
_PATIENCE_S = 20.0
"""For the authority's first word on what is shared: it comes with the first roots, within a second or so of the start."""
_OWN = frozenset({Reason.TOKEN_MISSING, Reason.TOKEN_EXPIRED, Reason.POD_NOT_FOUND})
"""Failures beside refusals that are of the pod that asked, and say nothing of the next one's."""
_TAKEN_BACK = frozenset({Reason.SERVICE_ACCOUNT_DENIED, Reason.NAME_NOT_ALLOWED, Reason.ISSUER_NOT_FOUND})


class Live(Protocol):
    """Whoever finds what the volumes of this node hold."""

    async def find(self, wanted: Wanted) -> Enrolled | None:
        """As :meth:`csi_driver.node.issuance.live_certificates.LiveCertificates.find`."""


class Shared:
    """What is held, the longest unused first. ``known`` gives the newest sets of roots, ``clock`` unix seconds."""

    def __init__(
        self, live: Live, known: Callable[[], Mapping[str, RootSet]], clock: Callable[[], float], most: int = _MOST
    ) -> None:
        self._live = live
        self._known = known
        self._clock = clock
        self._most = most
        self._held: OrderedDict[Wanted, Enrolled] = OrderedDict()
        # What this process has had or was refused, so that what was taken back does not come again out of a volume.
        self._known_here: OrderedDict[Wanted, None] = OrderedDict()
        self._flights: dict[Wanted, asyncio.Future[Enrolled | CertmountError | None]] = {}
        self._sharing: Collection[str] = ()
        self._due: Collection[str] = ()
        self._told = asyncio.Event()

    def streamed(self, sharing: Collection[str], due: Collection[str] = ()) -> None:
        """Takes the names of the issuers whose certificates are shared, and the digests of the keys that are held no longer."""
        self._sharing, self._due = sharing, due
        self._told.set()
        self._forget_expired()

    async def has(self, issuer: str) -> bool:
        """Whether certificates of an issuer are shared.

        Raises:
            CertmountError: AuthorityUnavailable while the authority has not said so: twenty pods must not order twenty
                certificates because their node has just started.
        """
        if issuer == DEFAULT_ISSUER:
            return False
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._told.wait()
        except TimeoutError:
            problem = f"the authority has not said yet whether pods share the certificates of issuer {issuer}"
            raise CertmountError(Reason.AUTHORITY_UNAVAILABLE, problem) from None
        return issuer in self._sharing

    async def obtain(
        self, wanted: Wanted, spec: CertificateSpec, ask: Callable[[], Awaitable[Enrolled]], *, first: bool
    ) -> Enrolled:
        """The certificate that is held, while it need not be renewed; else what ``ask`` gives, which one volume does for all.

        A volume's ``first`` one may be due for renewal: its pod starts with it, and renews it then.

        Raises:
            CertmountError: as ``ask``; or FederationNotFound.
        """
        while True:
            if (held := self._good(wanted, spec, first=first)) is not None:
                return held
            if (flight := self._flights.get(wanted)) is None:
                return self._fitted(await self._fly(wanted, spec, ask, first=first), spec)
            outcome = await asyncio.shield(flight)
            if isinstance(outcome, Enrolled):
                return self._fitted(outcome, spec)
            if outcome is not None:
                raise CertmountError(outcome.reason, *outcome.faults)

    async def _fly(
        self, wanted: Wanted, spec: CertificateSpec, ask: Callable[[], Awaitable[Enrolled]], *, first: bool
    ) -> Enrolled:
        flight = self._flights[wanted] = asyncio.get_running_loop().create_future()
        outcome: Enrolled | CertmountError | None = None
        try:
            if wanted not in self._known_here and (found := await self._live.find(wanted)) is not None:
                self._keep(wanted, found)
            enrolled = self._good(wanted, spec, first=first)
            if enrolled is None:
                enrolled = await ask()
                self._keep(wanted, enrolled)
            outcome = enrolled
        except CertmountError as error:
            if error.reason in _TAKEN_BACK:
                self._held.pop(wanted, None)
                self._note(wanted)
            if error.reason.kind.status != "PERMISSION_DENIED" and error.reason not in _OWN:
                outcome = error
            raise
        else:
            return enrolled
        finally:
            del self._flights[wanted]
            flight.set_result(outcome)

    def _good(self, wanted: Wanted, spec: CertificateSpec, *, first: bool) -> Enrolled | None:
        held = self._held.get(wanted)
        if held is None or (self._due and key_fingerprint(held.key.public_key()) in self._due):
            return None
        fitted = self._fitted(held, spec)
        until = (fitted.renew_at + fitted.not_after) / 2 if first else fitted.renew_at
        if self._clock() >= until:
            return None
        self._held.move_to_end(wanted)
        return fitted

    def _fitted(self, enrolled: Enrolled, spec: CertificateSpec) -> Enrolled:
        """The same, with the roots that a volume asks for, and renewed earlier where it asks for that."""
        names = trusted_root_set_names(spec, interim=enrolled.interim)
        sets = newest_root_sets(self._known(), enrolled.trust)
        if unknown := [name for name in names if name not in sets]:
            faults = (Fault("federations", f"the authority has no roots by the name {name}") for name in unknown)
            raise CertmountError(Reason.FEDERATION_NOT_FOUND, *faults)
        renew_at = enrolled.renew_at
        if spec.renew_before is not None:
            own = plan_renewal(
                issued_at=enrolled.issued_at,
                not_after=enrolled.not_after,
                renew_before_s=spec.renew_before.total_seconds(),
                renew_after_s=None,
                jitter=0.5,
            )
            renew_at = min(renew_at, own)
        return replace(enrolled, trust={name: sets[name] for name in names}, renew_at=renew_at)

    def _keep(self, wanted: Wanted, enrolled: Enrolled) -> None:
        self._note(wanted)
        self._held[wanted] = enrolled
        self._held.move_to_end(wanted)
        self._forget_expired()
        if len(self._held) > self._most:
            self._held.popitem(last=False)

    def _forget_expired(self) -> None:
        now = self._clock()
        for wanted in [wanted for wanted, held in self._held.items() if held.not_after <= now]:
            del self._held[wanted]

    def _note(self, wanted: Wanted) -> None:
        self._known_here[wanted] = None
        self._known_here.move_to_end(wanted)
        if len(self._known_here) > 2 * self._most:
            self._known_here.popitem(last=False)
