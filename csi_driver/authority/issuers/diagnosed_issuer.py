"""The common part of external issuers whose health is the result of periodic diagnostics."""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod

import structlog

from csi_driver.authority.issuers import Findings, Issuer, issuer_unavailable
from csi_driver.core.errors import CertmountError

log = structlog.get_logger(__name__)

DIAGNOSE_S = 60.0  # How fast new roots and replaced keys take effect
_DIAGNOSE_AFTER_PROBLEM_S = 5.0


class DiagnosedIssuer(Issuer):
    """Repeats its diagnostics and reports their result as :attr:`problem`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._problem: str | None = "diagnostics have not finished yet"
        self._diagnose_now = asyncio.Event()

    @property
    def problem(self) -> str | None:
        return self._problem

    @abstractmethod
    async def diagnose(self) -> Findings:
        """See :class:`Issuer`; implementations report the problem to :meth:`_report`."""

    async def _diagnose_periodically(self) -> None:
        while True:
            await self.diagnose()
            await self._maintain()
            self._diagnose_now.clear()
            if self._problem is not None:
                await asyncio.sleep(_DIAGNOSE_AFTER_PROBLEM_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DIAGNOSE_S):
                    await self._diagnose_now.wait()

    async def _maintain(self) -> None:
        """Do other periodic work after each diagnosis."""

    def _report(self, problem: str | None) -> None:
        if problem is None and self._problem is not None:
            log.info("issuer became available", issuer=self._name)
        elif problem != self._problem:
            log.warning("issuer has a problem", issuer=self._name, problem=problem)
        self._problem = problem
        if problem is not None:
            self._diagnose_now.set()

    def _unavailable(self, problem: str) -> CertmountError:
        hint = f"run `certmount issuer check {self._name}` for details"
        return issuer_unavailable(f"issuer {self._name}", problem, hint)
