"""Following the authority's roots goes on, whatever comes of one try."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from cryptography import x509

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.node.trust import follow_trust
from tests.support.scripted_authority import TestCA
from tests.unit.node.virtual_time import run_virtually


class _Source:
    """A stream for each connection: what it yields, then how it ends."""

    def __init__(self, *streams: tuple[list[bytes], Exception | None]) -> None:
        self.streams = list(streams)
        self.asked_at: list[float] = []

    async def watch_trust(self) -> AsyncIterator[Sequence[bytes]]:
        self.asked_at.append(asyncio.get_running_loop().time())
        if not self.streams:
            await asyncio.Event().wait()
        roots, end = self.streams.pop(0)
        for root in roots:
            yield [root]
        if end is not None:
            raise end


def _follow(source: _Source) -> list[Sequence[x509.Certificate]]:
    seen: list[Sequence[x509.Certificate]] = []

    async def replace_roots(roots: Sequence[x509.Certificate]) -> None:
        seen.append(roots)

    async def follow() -> None:
        task = asyncio.create_task(follow_trust(source, replace_roots, lambda: 0.5))
        await asyncio.sleep(3600)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    run_virtually(follow())
    return seen


@pytest.mark.parametrize(
    "end",
    [
        None,
        CertmountError(Reason.AUTHORITY_UNAVAILABLE, "gone"),
        RuntimeError("a defect that quotes eyJhbGciOiJub25lIn0.e30.x"),
    ],
    ids=["ended", "lost", "defect"],
)
def test_it_asks_again(end: Exception | None, capsys: pytest.CaptureFixture[str]) -> None:
    """A stream that ends, breaks or hits a defect is opened again; the text of a defect is not shown."""
    first, second = TestCA("first"), TestCA("second")
    seen = _follow(_Source(([first.der], end), ([second.der], None)))
    assert [roots[0] for roots in seen] == [first.certificate, second.certificate]
    assert "eyJ" not in "".join(capsys.readouterr())


def test_it_backs_off_and_starts_afresh_after_a_success() -> None:
    """Tries grow apart up to half a minute while nothing comes; roots that arrive end that."""
    down: tuple[list[bytes], Exception | None] = ([], CertmountError(Reason.TRUST_MISSING, "no root"))
    source = _Source(*[down] * 8, ([TestCA().der], None), down)
    _follow(source)
    gaps = [later - sooner for sooner, later in zip(source.asked_at, source.asked_at[1:], strict=False)]
    assert [round(gap) for gap in gaps[:10]] == [1, 2, 4, 8, 16, 30, 30, 30, 1, 2]


def test_roots_that_make_no_sense_are_passed_over() -> None:
    """What is no certificate reaches no volume, and the stream is asked again."""
    good = TestCA()
    assert [roots[0] for roots in _follow(_Source(([b"x"], None), ([good.der], None)))] == [good.certificate]
