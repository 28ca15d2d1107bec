"""The roots: who hears of them, and where they are published."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.trust import FolderPublisher, Trust
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import until

Roots = tuple[bytes, ...]


async def test_a_watcher_gets_the_roots_now_and_each_change(metrics: AuthorityMetrics) -> None:
    """Setting the same roots again is no change."""
    trust = Trust(metrics)
    trust.set((b"1",))
    watch = trust.watch()
    assert await anext(watch) == (b"1",)
    trust.set((b"1",))
    waiting = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    assert not waiting.done()
    trust.set((b"1", b"2"))
    assert await waiting == (b"1", b"2")
    await watch.aclose()


async def test_a_slow_watcher_gets_the_latest_roots(metrics: AuthorityMetrics) -> None:
    """What came and went in between is of no use to anyone."""
    trust = Trust(metrics)
    trust.set((b"1",))
    watch = trust.watch()
    await anext(watch)
    for roots in ((b"2",), (b"3",), (b"4",)):
        trust.set(roots)
    assert await anext(watch) == (b"4",)
    await watch.aclose()


async def test_a_watcher_that_comes_before_the_roots_waits(metrics: AuthorityMetrics) -> None:
    """No empty bundle is ever sent: a node would take it for the end of all trust."""
    trust = Trust(metrics)
    watch = trust.watch()
    waiting = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    assert not waiting.done()
    trust.set((b"1",))
    assert await waiting == (b"1",)
    await watch.aclose()


async def test_closing_ends_all_watches(metrics: AuthorityMetrics, registry: CollectorRegistry) -> None:
    """Those that wait, and those that come later; so a stop is not held up by streams that never end."""
    trust = Trust(metrics)
    trust.set((b"1",))

    async def follow() -> list[Roots]:
        return [roots async for roots in trust.watch()]

    async with asyncio.TaskGroup() as tasks:
        watchers = [tasks.create_task(follow()) for _ in range(5)]
        await until(lambda: registry.get_sample_value("certmount_authority_trust_watchers") == 5, "five watchers")
        trust.close()
    assert [watcher.result() for watcher in watchers] == [[(b"1",)]] * 5
    assert await follow() == []
    assert registry.get_sample_value("certmount_authority_trust_watchers") == 0


async def test_a_watch_ends_by_itself(metrics: AuthorityMetrics, registry: CollectorRegistry) -> None:
    """Cleanly, so that its caller proves itself again, and no replica keeps its callers for ever."""
    trust = Trust(metrics, longest=timedelta(milliseconds=20))
    trust.set((b"1",))
    assert [roots async for roots in trust.watch()] == [(b"1",)]
    assert registry.get_sample_value("certmount_authority_trust_watchers") == 0


async def test_watchers_are_bounded(metrics: AuthorityMetrics) -> None:
    """One too many is told to come later; a place is free again when someone leaves."""
    trust = Trust(metrics, most_watchers=2)
    trust.set((b"1",))
    first, second = trust.watch(), trust.watch()
    await anext(first)
    await anext(second)
    with pytest.raises(CertmountError) as refusal:
        await anext(trust.watch())
    assert refusal.value.reason is Reason.OVERLOADED
    await first.aclose()
    third = trust.watch()
    assert await anext(third) == (b"1",)
    await second.aclose()
    await third.aclose()


async def test_the_root_is_published_to_a_folder(tmp_path: Path) -> None:
    """Readable by all, and not written again while it is right."""
    publisher, file = FolderPublisher(tmp_path), tmp_path / "root.crt"
    await publisher.publish(b"root")
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"root", 0o644)
    before = file.stat()
    await publisher.publish(b"root")
    assert file.stat().st_ino == before.st_ino
    file.write_bytes(b"somebody's mistake")
    await publisher.publish(b"root")
    assert file.read_bytes() == b"root"


async def test_a_root_that_cannot_be_published_may_be_later(tmp_path: Path) -> None:
    """It names the file."""
    with pytest.raises(CertmountError, match=r"missing/root\.crt: cannot be written") as failure:
        await FolderPublisher(tmp_path / "missing").publish(b"root")
    assert failure.value.retryable
