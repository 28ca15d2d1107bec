"""Asks the CA from time to time whether a certificate that is out there is to be renewed sooner (RFC 9773 section 4.3)."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import structlog

from csi_driver.authority.issuers.acme.client import CaProblem
from csi_driver.authority.issuers.acme.order import Workshop
from csi_driver.authority.issuers.acme.renewal import Window, ask_window, next_look
from csi_driver.authority.issuers.acme.state import State
from csi_driver.core.errors import CertmountError

log = structlog.get_logger(__name__)

_STEP_S = 60.0


class RenewalWatch:
    """Keeps the moments of renewal as the CA wants them."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.look()
            except (CaProblem, CertmountError) as error:
                log.warning("ACME renewal information is missing", problem=str(error))
            await asyncio.sleep(_STEP_S)

    async def look(self) -> None:
        """Asks about all whose time to ask has come; raises CaProblem or CertmountError, after which the others wait for theirs."""
        now = self._shop.clock()
        if not any(one.look_at <= now < one.not_after for one in (await self._shop.book.read()).live):
            return
        taken: list[str] = []

        def take(state: State) -> State:
            taken.clear()
            for one in state.live:
                if one.look_at <= now < one.not_after:
                    taken.append(one.certificate_id)
                    state = state.with_live(dataclasses.replace(one, look_at=next_look(now)))
            return state

        await self._shop.book.change(take)  # so that one replica asks about each
        connection = await self._shop.accounts.connect()
        for certificate in taken:
            window = await self._shop.in_thread(ask_window, connection, certificate, now)
            if window is not None:
                await self._move(certificate, window)

    async def _move(self, certificate: str, window: Window) -> None:
        jitter = random.random()  # noqa: S311  # spreads load, hides nothing

        def moved(state: State) -> State:
            for one in state.live:
                if one.certificate_id == certificate:
                    moment = window.moment(jitter, one.renew_at)
                    return state.with_live(dataclasses.replace(one, renew_at=moment, look_at=window.look_at))
            return state

        await self._shop.book.change(moved)
