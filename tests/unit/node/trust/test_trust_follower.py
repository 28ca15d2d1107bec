"""The trust stream is followed whatever fails, and written root sets are acknowledged once for each stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.node.trust.trust_follower import follow_trust
from csi_driver.rpc.authority_messages import TrustBundle
from tests.support.waiting import in_background
from tests.unit.node.virtual_time import run_virtually

_UNAVAILABLE = CertmountError(Reason.AUTHORITY_UNAVAILABLE, "gone")


def _bundle(generation: int) -> TrustBundle:
    return TrustBundle({"internal": RootSet((b"root",), generation)}, "")


@dataclass
class _Source:
    """The bundles and the error of each stream; after the last one, a stream stays open."""

    streams: list[tuple[list[TrustBundle], Exception | None]]
    errors: list[Exception] = field(default_factory=list)  # the errors of the first acknowledgements
    connected_at: list[float] = field(default_factory=list)
    acknowledged: list[tuple[str, int, int]] = field(default_factory=list)  # set, generation and time

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        self.connected_at.append(asyncio.get_running_loop().time())
        if not self.streams:
            await asyncio.Event().wait()
        bundles, error = self.streams.pop(0)
        for bundle in bundles:
            yield bundle
        if error is not None:
            raise error

    async def acknowledge_root_set(self, name: str, generation: int) -> None:
        self.acknowledged.append((name, generation, round(asyncio.get_running_loop().time())))
        if self.errors:
            raise self.errors.pop(0)


@dataclass
class _Written:
    """The root sets that all volumes contain."""

    sets: dict[str, int] = field(default_factory=dict)
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def written(self, acknowledged: Mapping[str, int]) -> Mapping[str, int]:
        return {name: each for name, each in self.sets.items() if each > acknowledged.get(name, -1)}

    async def changed(self) -> None:
        await self.event.wait()
        self.event.clear()

    def write(self, sets: dict[str, int]) -> None:
        self.sets.update(sets)
        self.event.set()


def _follow(
    source: _Source,
    *writes: tuple[float, dict[str, int]],
    rejects: Callable[[TrustBundle], bool] = lambda _: False,
    report: Callable[[bool], None] = lambda _: None,
) -> list[TrustBundle]:
    """Follow for an hour and return the applied bundles. Each write happens at its time in seconds."""
    applied: list[TrustBundle] = []

    def apply(bundle: TrustBundle) -> None:
        if rejects(bundle):
            raise CertmountError(Reason.INVALID_RESPONSE, "invalid")
        applied.append(bundle)

    async def follow() -> None:
        written, loop = _Written(), asyncio.get_running_loop()
        for time, sets in writes:
            loop.call_later(time, written.write, sets)
        async with in_background(follow_trust(source, apply, written, lambda: 0.5, report)):
            await asyncio.sleep(3600)

    run_virtually(follow())
    return applied


@pytest.mark.parametrize(
    "error",
    [None, _UNAVAILABLE, RuntimeError("a defect that quotes eyJhbGciOiJub25lIn0.e30.x")],
    ids=["ended", "lost", "defect"],
)
def test_stream_is_opened_again(error: Exception | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert _follow(_Source([([_bundle(1)], error), ([_bundle(2)], None)])) == [_bundle(1), _bundle(2)]
    assert "eyJ" not in "".join(capsys.readouterr())


def test_end_of_a_stream_is_reported() -> None:
    reports: list[bool] = []
    _follow(_Source([([], _UNAVAILABLE), ([_bundle(1), _bundle(2)], _UNAVAILABLE)]), report=reports.append)
    assert reports == [False, True, True, False]


def test_backoff_grows_to_30_seconds_and_is_reset_by_a_bundle() -> None:
    down: tuple[list[TrustBundle], Exception | None] = ([], CertmountError(Reason.ROOT_CERTIFICATE_MISSING, "no root"))
    source = _Source([*[down] * 8, ([_bundle(1)], None), down])
    _follow(source)
    gaps = [round(later - earlier) for earlier, later in pairwise(source.connected_at)]
    assert gaps[:10] == [1, 2, 4, 8, 16, 30, 30, 30, 1, 2]


def test_invalid_bundle_ends_the_stream() -> None:
    source = _Source([([_bundle(1)], None), ([_bundle(2)], None)])
    assert _follow(source, rejects=lambda bundle: bundle == _bundle(1)) == [_bundle(2)]


def test_each_generation_is_acknowledged_once() -> None:
    """The first one of a set immediately, later ones after a random delay."""
    source = _Source([])
    _follow(source, (10, {"internal": 1}), (20, {"internal": 1}), (30, {"partner": 7}), (40, {"internal": 3}))
    assert source.acknowledged == [("internal", 1, 10), ("partner", 7, 30), ("internal", 3, 45)]


def test_failed_acknowledgement_is_retried() -> None:
    source = _Source([], errors=[_UNAVAILABLE, _UNAVAILABLE])
    _follow(source, (10, {"internal": 1, "partner": 2}))
    assert source.acknowledged == [("internal", 1, 10), ("internal", 1, 11), ("internal", 1, 13), ("partner", 2, 13)]
    assert len(source.connected_at) == 3


def test_every_stream_gets_an_acknowledgement() -> None:
    """Another replica may not have received the earlier ones."""
    source = _Source([([_bundle(1)], None), ([_bundle(1)], None)])
    _follow(source, (0, {"internal": 1}))
    assert [(name, generation) for name, generation, _ in source.acknowledged] == [("internal", 1)] * 3
