"""Following the authority's roots goes on, whatever comes of one try; what is held is confirmed once a stream and change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import pytest

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.node.authority_messages import TrustBundle
from csi_driver.node.trust.trust_follower import follow_trust
from tests.unit.node.virtual_time import run_virtually

_AWAY = CertmountError(Reason.AUTHORITY_UNAVAILABLE, "gone")


def _bundle(generation: int) -> TrustBundle:
    return TrustBundle({"internal": RootSet((b"root",), generation)}, "")


@dataclass
class _Source:
    """A stream for each connection: what it yields, then how it ends; one that is none stays open."""

    streams: list[tuple[list[TrustBundle], Exception | None]]
    refuses: list[Exception] = field(default_factory=list)
    """How the first confirmations fail."""
    asked_at: list[float] = field(default_factory=list)
    confirmed: list[tuple[str, int, float]] = field(default_factory=list)

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        self.asked_at.append(asyncio.get_running_loop().time())
        if not self.streams:
            await asyncio.Event().wait()
        bundles, end = self.streams.pop(0)
        for bundle in bundles:
            yield bundle
        if end is not None:
            raise end

    async def confirm_trust(self, name: str, generation: int) -> None:
        self.confirmed.append((name, generation, asyncio.get_running_loop().time()))
        if self.refuses:
            raise self.refuses.pop(0)


@dataclass
class _Holdings:
    """What the volumes hold, as a test says."""

    now: dict[str, int] = field(default_factory=dict)
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def written(self) -> Mapping[str, int]:
        return dict(self.now)

    async def changed(self) -> None:
        await self.event.wait()
        self.event.clear()

    def hold(self, **sets: int) -> None:
        self.now.update(sets)
        self.event.set()


def _follow(
    source: _Source,
    *steps: tuple[float, Callable[[_Holdings], None]],
    refused: Callable[[TrustBundle], bool] | None = None,
) -> list[TrustBundle]:
    """Follows for an hour; each step runs at its moment."""
    seen: list[TrustBundle] = []

    def take(bundle: TrustBundle) -> None:
        if refused is not None and refused(bundle):
            raise CertmountError(Reason.INVALID_RESPONSE, "makes no sense")
        seen.append(bundle)

    async def follow() -> None:
        holdings, loop = _Holdings(), asyncio.get_running_loop()
        for moment, step in steps:
            loop.call_later(moment, step, holdings)
        task = asyncio.create_task(follow_trust(source, take, holdings, lambda: 0.5))
        await asyncio.sleep(3600)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    run_virtually(follow())
    return seen


@pytest.mark.parametrize(
    "end",
    [None, _AWAY, RuntimeError("a defect that quotes eyJhbGciOiJub25lIn0.e30.x")],
    ids=["ended", "lost", "defect"],
)
def test_it_asks_again(end: Exception | None, capsys: pytest.CaptureFixture[str]) -> None:
    """A stream that ends, breaks or hits a defect is opened again; the text of a defect is not shown."""
    assert _follow(_Source([([_bundle(1)], end), ([_bundle(2)], None)])) == [_bundle(1), _bundle(2)]
    assert "eyJ" not in "".join(capsys.readouterr())


def test_it_backs_off_and_starts_afresh_after_a_success() -> None:
    """Tries grow apart up to half a minute while nothing comes; roots that arrive end that."""
    down: tuple[list[TrustBundle], Exception | None] = ([], CertmountError(Reason.ROOT_CERTIFICATE_MISSING, "no root"))
    source = _Source([*[down] * 8, ([_bundle(1)], None), down])
    _follow(source)
    gaps = [later - sooner for sooner, later in zip(source.asked_at, source.asked_at[1:], strict=False)]
    assert [round(gap) for gap in gaps[:10]] == [1, 2, 4, 8, 16, 30, 30, 30, 1, 2]


def test_what_makes_no_sense_is_passed_over() -> None:
    """A bundle that is not taken ends the stream, which is asked again."""
    source = _Source([([_bundle(1)], None), ([_bundle(2)], None)])
    assert _follow(source, refused=lambda bundle: bundle == _bundle(1)) == [_bundle(2)]


def test_what_is_held_is_confirmed_once() -> None:
    """Each set at once when it is first held on a stream, each newer state later by rng, and none twice."""
    source = _Source([])
    _follow(
        source,
        (10, lambda holdings: holdings.hold(internal=1)),
        (20, lambda holdings: holdings.hold(internal=1)),
        (30, lambda holdings: holdings.hold(partner=7)),
        (40, lambda holdings: holdings.hold(internal=3)),
    )
    told = [(name, generation, round(moment)) for name, generation, moment in source.confirmed]
    assert told == [("internal", 1, 10), ("partner", 7, 30), ("internal", 3, 45)]


def test_a_confirmation_that_fails_is_made_again() -> None:
    """It ends the stream; the next one confirms everything anew, with backoff between."""
    source = _Source([], refuses=[_AWAY, _AWAY])
    _follow(source, (10, lambda holdings: holdings.hold(internal=1, partner=2)))
    assert [(name, generation) for name, generation, _ in source.confirmed] == [
        ("internal", 1),
        ("internal", 1),
        ("internal", 1),
        ("partner", 2),
    ]
    assert [round(moment) for _, _, moment in source.confirmed[:3]] == [10, 11, 13]
    assert len(source.asked_at) == 3


def test_every_stream_hears_it() -> None:
    """A replica may have forgotten or never known: what is held is confirmed to each new stream."""
    source = _Source([([_bundle(1)], None), ([_bundle(1)], None)])
    _follow(source, (0, lambda holdings: holdings.hold(internal=1)))
    assert [(name, generation) for name, generation, _ in source.confirmed] == [("internal", 1)] * 3
