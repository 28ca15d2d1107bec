"""Looks after the requests for our own signer: decides, approves or denies, and writes the certificate."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from csi_driver.authority.csr_api import CSRClient
from csi_driver.authority.csr_signer.decision import Decisions, Signed
from csi_driver.authority.csr_signer.leadership import Leadership
from csi_driver.authority.issuance.pipeline import EventRecorder, milliseconds
from csi_driver.core.cluster.csr import APPROVED, DENIED, FAILED, OWN_SIGNER, ClusterCSR, CSRCondition
from csi_driver.core.errors import REASONS, CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.kube.csrs import CSRs

log = structlog.get_logger(__name__)
audit = structlog.get_logger("audit")

_MOST_SETTLED = 10_000
_WORKERS = 8
"""At once; more would only wait for the API server."""
_FIRST_RETRY_S, _RETRY_CAP_S = 1.0, 60.0
_OWN_NAME_RETRY_S = 5.0
_GRANTED = "PolicyAllows"


@dataclass(slots=True)
class _Queue:
    """Names of requests, each once, that are to be looked at."""

    waiting: dict[str, None] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    failures: dict[str, int] = field(default_factory=dict)
    settled: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Uids of the latest that are finished, though the watch may still tell of what came before: nothing is signed twice."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, name: str) -> None:
        self.waiting[name] = None
        self.news.set()

    async def take(self) -> str:
        """The next that nobody is busy with."""
        while True:
            for name in self.waiting:
                if name not in self.busy:
                    del self.waiting[name]
                    self.busy.add(name)
                    return name
            self.news.clear()
            await self.news.wait()

    def settle(self, csr: ClusterCSR) -> None:
        """Nothing more is to be done about it."""
        self.failures.pop(csr.name, None)
        self.settled[csr.uid] = None
        if len(self.settled) > _MOST_SETTLED:
            self.settled.popitem(last=False)

    def done(self, name: str) -> None:
        self.busy.discard(name)
        self.news.set()  # it may have been added meanwhile


class CSRSigner:
    """Runs in each replica; the one that holds the lease works."""

    def __init__(
        self,
        requests: CSRClient,
        decisions: Decisions,
        leadership: Leadership,
        events: EventRecorder,
        ended: Callable[[float, Reason | None], None],
    ) -> None:
        """``ended`` gets, of each request that was looked at, the seconds and why there is no certificate, if there is none."""
        self._requests = requests
        self._decisions = decisions
        self._leadership = leadership
        self._events = events
        self._ended = ended
        self._own_username = ""

    async def run(self) -> None:
        """For ever."""
        await self._leadership.run(self._work)

    async def _work(self) -> None:
        while not self._own_username:
            try:
                self._own_username = await self._requests.own_username()
            except CertmountError as error:
                log.warning("certificate signing requests wait", error=str(error))
                await asyncio.sleep(_OWN_NAME_RETRY_S)
        queue = _Queue()

        def changed(csr: ClusterCSR) -> None:
            # The watch selects by the signer's name; nothing else may reach what signs.
            if csr.signer == OWN_SIGNER and not csr.finished and csr.uid not in queue.settled:
                queue.add(csr.name)

        known = CSRs(changed, keep_finished=False)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._requests.follow(known, signer=OWN_SIGNER).run(), name="watch of requests")
            for _ in range(_WORKERS):
                tasks.create_task(self._serve(queue, known), name="signer of requests")

    async def _serve(self, queue: _Queue, known: CSRs) -> None:
        while True:
            name = await queue.take()
            try:
                csr = known.find(name)
                # Somebody has deleted it; or it was answered while the watch told of its approval, as it does in between.
                if csr is None or csr.uid in queue.settled:
                    queue.failures.pop(name, None)
                elif await self._settled(csr, again=name in queue.failures):
                    queue.settle(csr)
                else:
                    queue.failures[name] = failures = queue.failures.get(name, 0) + 1
                    delay = min(_FIRST_RETRY_S * 2.0 ** min(failures - 1, 16), _RETRY_CAP_S)
                    asyncio.get_running_loop().call_later(delay, queue.add, name)
            finally:
                queue.done(name)

    async def _settled(self, csr: ClusterCSR, *, again: bool) -> bool:
        """Decides a request and answers it; False where it is to be tried again."""
        started = time.perf_counter()
        record: dict[str, Any] = {"decision": "none"}
        try:
            return (await self._settle(csr, record, again=again)).finished
        except CertmountError as error:
            record.update(reason=error.reason.word, error=str(error))
            return False
        except Exception:  # one request must not keep the others from being looked at
            log.exception("a certificate signing request could not be looked at", csr=csr.name)
            record.update(reason=Reason.INTERNAL.word)
            return False
        finally:
            audit.info("certificate", duration_ms=milliseconds(started), **record)
            self._ended(time.perf_counter() - started, REASONS.get(record.get("reason", "")))

    async def _settle(self, csr: ClusterCSR, record: dict[str, Any], *, again: bool) -> ClusterCSR:
        try:
            signed = await self._decisions.decide(csr, self._own_username, record, again=again)
        except CertmountError as error:
            if error.retryable and error.reason is not Reason.TOO_MANY_REQUESTS:
                raise
            record.update(decision="refused", reason=error.reason.word, error=str(error))
            return await self._refused(csr, error, record)
        # Signed before it is approved: what the CA won't sign is denied, and a request that someone denies meanwhile stays denied.
        now = await self._handed_out(csr, signed)
        record["decision"] = "issued" if now.certificate else "refused"
        if now.refusal is not None:
            record["error"] = f"decided by someone else: {now.refusal}"
        return now

    async def _handed_out(self, csr: ClusterCSR, signed: Signed) -> ClusterCSR:
        now = csr
        if now.condition(APPROVED) is None:
            now = await self._requests.decide(csr, CSRCondition(APPROVED, _GRANTED, signed.why))
        return now if now.finished else await self._requests.answer(csr, signed.certificate)

    async def _refused(self, csr: ClusterCSR, error: CertmountError, record: dict[str, Any]) -> ClusterCSR:
        text = str(error.args[0])
        if pod := record.get("pod"):
            account = ServiceAccount(record["namespace"], record["service_account"])
            identity = PodIdentity(account, "", pod, record["pod_uid"], record["node"], "", 0.0)
            self._events.record(identity, warning=True, reason=error.reason.word, message=text)
        now = csr
        if now.condition(APPROVED) is None:
            now = await self._requests.decide(csr, CSRCondition(DENIED, error.reason.word, text))
        if now.finished:
            return now
        # Someone has approved it by hand, which makes no name theirs; it can't be denied any more.
        return await self._requests.fail(csr, CSRCondition(FAILED, error.reason.word, text))
