"""The roots: who hears of them, and where they are published."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.trust.bundles import TrustBundles, TrustSnapshot
from csi_driver.authority.trust.publishers import DirectoryPublisher
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import until

ONE, TWO = RootSet((b"1",), 1), RootSet((b"1", b"2"), 2)


@pytest.fixture
def trust(metrics: AuthorityMetrics) -> TrustBundles:
    trust = TrustBundles(metrics)
    trust.set_roots("internal", ONE)
    return trust


async def test_a_watcher_gets_the_sets_now_and_each_change(trust: TrustBundles) -> None:
    """Of roots and of the policy; setting the same again is no change."""
    watch = trust.watch()
    assert await anext(watch) == TrustSnapshot({"internal": ONE}, "")
    trust.set_roots("internal", ONE)
    trust.set_policy("")
    trust.remove_roots("unknown")
    waiting = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    assert not waiting.done()
    trust.set_roots("internal", TWO)
    assert await waiting == TrustSnapshot({"internal": TWO}, "")
    trust.set_policy("a")
    assert await anext(watch) == TrustSnapshot({"internal": TWO}, "a")
    trust.set_roots("partner", ONE)
    assert await anext(watch) == TrustSnapshot({"internal": TWO, "partner": ONE}, "a")
    trust.remove_roots("partner")
    assert await anext(watch) == TrustSnapshot({"internal": TWO}, "a")
    await watch.aclose()


async def test_a_slow_watcher_gets_the_latest_roots(trust: TrustBundles) -> None:
    """What came and went in between is of no use to anyone."""
    watch = trust.watch()
    await anext(watch)
    for generation in (2, 3, 4):
        trust.set_roots("internal", RootSet((b"x",), generation))
    assert (await anext(watch)).sets["internal"].generation == 4
    await watch.aclose()


async def test_a_watcher_that_comes_before_the_roots_waits(metrics: AuthorityMetrics) -> None:
    """No empty bundle is ever sent: a node would take it for the end of all trust."""
    trust = TrustBundles(metrics)
    trust.set_policy("a")
    watch = trust.watch()
    waiting = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    assert not waiting.done()
    trust.set_roots("internal", ONE)
    assert await waiting == TrustSnapshot({"internal": ONE}, "a")
    await watch.aclose()


async def test_closing_ends_all_watches(trust: TrustBundles, registry: CollectorRegistry) -> None:
    """Those that wait, and those that come later; so a stop is not held up by streams that never end."""

    async def follow() -> list[TrustSnapshot]:
        return [bundle async for bundle in trust.watch()]

    async with asyncio.TaskGroup() as tasks:
        watchers = [tasks.create_task(follow()) for _ in range(5)]
        await until(lambda: registry.get_sample_value("certmount_authority_trust_watchers") == 5, "five watchers")
        trust.close()
    assert [watcher.result() for watcher in watchers] == [[TrustSnapshot({"internal": ONE}, "")]] * 5
    assert await follow() == []
    assert registry.get_sample_value("certmount_authority_trust_watchers") == 0


async def test_a_watch_ends_by_itself(metrics: AuthorityMetrics, registry: CollectorRegistry) -> None:
    """Cleanly, so that its caller proves itself again, and no replica keeps its callers for ever."""
    trust = TrustBundles(metrics, longest=timedelta(milliseconds=20))
    trust.set_roots("internal", ONE)
    assert len([bundle async for bundle in trust.watch()]) == 1
    assert registry.get_sample_value("certmount_authority_trust_watchers") == 0


async def test_watchers_are_bounded(metrics: AuthorityMetrics) -> None:
    """One too many is told to come later; a place is free again when someone leaves."""
    trust = TrustBundles(metrics, most_watchers=2)
    trust.set_roots("internal", ONE)
    first, second = trust.watch(), trust.watch()
    await anext(first)
    await anext(second)
    with pytest.raises(CertmountError) as refusal:
        await anext(trust.watch())
    assert refusal.value.reason is Reason.AUTHORITY_OVERLOADED
    await first.aclose()
    third = trust.watch()
    assert (await anext(third)).sets == {"internal": ONE}
    await second.aclose()
    await third.aclose()


async def test_a_pod_gets_the_sets_of_its_issuer_and_of_what_it_asks_for(trust: TrustBundles) -> None:
    """And none that it did not ask for: a partner's root could vouch for any name."""
    trust.set_roots("partner", TWO)
    trust.set_roots("other", TWO)
    assert trust.select("internal", ()) == {"internal": ONE}
    assert trust.select("internal", ("partner",)) == {"internal": ONE, "partner": TWO}


async def test_watchers_hear_whose_certificates_are_shared(trust: TrustBundles) -> None:
    """With all the rest, and again when it changes; in one order, so that no change is none."""
    watch = trust.watch()
    assert (await anext(watch)).shared_issuers == ()
    trust.set_shared_issuers({"b", "a"})
    trust.set_policy("new")
    assert (await anext(watch)).shared_issuers == ("a", "b")
    before = trust.snapshot
    trust.set_shared_issuers(["a", "b"])
    assert trust.snapshot is before
    trust.set_roots("partner", TWO)
    bundle = await anext(watch)
    assert (bundle.shared_issuers, bundle.policy_revision) == (("a", "b"), "new")
    await watch.aclose()


async def test_all_unknown_federations_are_named(trust: TrustBundles) -> None:
    """With those that there are."""
    trust.set_roots("partner", TWO)
    with pytest.raises(CertmountError) as refusal:
        trust.select("internal", ("a", "partner", "b"))
    assert refusal.value.reason is Reason.FEDERATION_NOT_FOUND
    assert [fault.problem for fault in refusal.value.faults if isinstance(fault, Fault)] == [
        "the authority has no roots by the name a",
        "the authority has no roots by the name b",
    ]
    assert "known are internal, partner" in str(refusal.value)


async def test_without_roots_of_the_issuer_no_one_is_answered(trust: TrustBundles) -> None:
    """A certificate that its own pod could not verify is worth another try, not more."""
    with pytest.raises(CertmountError, match="the roots of issuer acme are not known yet") as refusal:
        trust.select("acme", ())
    assert refusal.value.retryable


async def test_the_root_is_published_to_a_folder(tmp_path: Path) -> None:
    """Readable by all, and not written again while it is right."""
    publisher, file = DirectoryPublisher(tmp_path), tmp_path / "root.crt"
    await publisher.publish(b"root", b"own")
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"root", 0o644)
    assert (tmp_path / "authority.crt").read_bytes() == b"own"
    before = file.stat()
    await publisher.publish(b"root", b"own")
    assert file.stat().st_ino == before.st_ino
    file.write_bytes(b"somebody's mistake")
    await publisher.publish(b"root", b"own")
    assert file.read_bytes() == b"root"


async def test_a_root_that_cannot_be_published_may_be_later(tmp_path: Path) -> None:
    """It names the file."""
    with pytest.raises(CertmountError, match=r"missing/root\.crt: cannot be written") as failure:
        await DirectoryPublisher(tmp_path / "missing").publish(b"root", b"own")
    assert failure.value.retryable
