"""Follow the authority's trust stream, and acknowledge root sets that all volumes contain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

import structlog

from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.core.renewal import retry_delay_s
from csi_driver.rpc.authority_messages import TrustBundle

log = structlog.get_logger(__name__)

_MAX_ACKNOWLEDGEMENT_DELAY_S = 10.0
"""The nodes receive a change at the same time; a random delay spreads their acknowledgements."""


class TrustSource(Protocol):
    """The trust API of the authority, see AuthorityClient."""

    def watch_trust(self) -> AsyncIterator[TrustBundle]: ...

    async def acknowledge_root_set(self, name: str, generation: int) -> None: ...


class WrittenRootSets(Protocol):
    """The root sets that all volumes contain, see RootDistribution."""

    def written(self, acknowledged: Mapping[str, int], /) -> Mapping[str, int]: ...

    async def changed(self) -> None: ...


async def follow_trust(
    source: TrustSource,
    apply: Callable[[TrustBundle], None],
    root_sets: WrittenRootSets,
    rng: Callable[[], float],
    report: Callable[[bool], None],
) -> None:
    """Apply every trust bundle and acknowledge root sets until cancelled; reconnect with backoff.

    ``report`` takes True when a stream delivers a bundle, and False when it ends.

    A failed acknowledgement ends the stream. The next stream acknowledges all sets again.
    """
    failures = 0

    async def watch() -> None:
        nonlocal failures
        async for bundle in source.watch_trust():
            apply(bundle)
            report(True)
            failures = 0

    while True:
        try:
            await _run_until_one_ends(watch(), _acknowledge(source, root_sets, rng))
        except CertmountError as error:
            if failures == 0:
                log.warning("trust stream failed", reason=error.reason.word, error=str(error))
        except Exception as error:  # noqa: BLE001  # an unexpected error must not stop renewals; its text can contain a token
            log.error("trust stream failed", reason=Reason.INTERNAL.word, error=type(error).__name__)  # noqa: TRY400
        report(False)
        failures += 1
        await asyncio.sleep(retry_delay_s(attempt=failures, kind=FailureKind.UNAVAILABLE, jitter=rng()))


async def _acknowledge(source: TrustSource, root_sets: WrittenRootSets, rng: Callable[[], float]) -> None:
    """Acknowledge each generation of each set when all volumes contain it."""
    acknowledged: dict[str, int] = {}
    while True:
        new = root_sets.written(acknowledged)
        # The first acknowledgements need no delay: the nodes do not connect at the same time.
        if new.keys() & acknowledged.keys():
            await asyncio.sleep(rng() * _MAX_ACKNOWLEDGEMENT_DELAY_S)
        for name, generation in new.items():
            await source.acknowledge_root_set(name, generation)
            log.info("root set acknowledged", set=name, generation=generation)
            acknowledged[name] = generation
        if not new:
            await root_sets.changed()


async def _run_until_one_ends(*coroutines: Awaitable[None]) -> None:
    """Run the coroutines concurrently. When the first one ends, cancel the others and raise its exception, if any."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in done:
        task.result()
