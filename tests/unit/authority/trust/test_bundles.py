"""The trust bundle: what watchers receive, and where roots are published."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.trust.bundles import DirectoryPublisher, TrustBundles, TrustSnapshot
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


async def test_watcher_receives_the_bundle_and_each_change(trust: TrustBundles) -> None:
    """Setting the same value again is no change."""
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


async def test_slow_watcher_receives_only_the_latest_roots(trust: TrustBundles) -> None:
    watch = trust.watch()
    await anext(watch)
    for generation in (2, 3, 4):
        trust.set_roots("internal", RootSet((b"x",), generation))
    assert (await anext(watch)).sets["internal"].generation == 4
    await watch.aclose()


async def test_watcher_waits_until_there_are_roots(metrics: AuthorityMetrics) -> None:
    """An empty bundle would tell a node to remove all roots."""
    trust = TrustBundles(metrics)
    trust.set_policy("a")
    watch = trust.watch()
    waiting = asyncio.create_task(anext(watch))
    await asyncio.sleep(0)
    assert not waiting.done()
    trust.set_roots("internal", ONE)
    assert await waiting == TrustSnapshot({"internal": ONE}, "a")
    await watch.aclose()


async def test_close_ends_current_and_future_watches(trust: TrustBundles, registry: CollectorRegistry) -> None:
    """Otherwise endless streams would delay the shutdown."""

    async def follow() -> list[TrustSnapshot]:
        return [bundle async for bundle in trust.watch()]

    async with asyncio.TaskGroup() as tasks:
        watchers = [tasks.create_task(follow()) for _ in range(5)]
        await until(lambda: registry.get_sample_value("certmount_authority_trust_watchers") == 5, "five watchers")
        trust.close()
    assert [watcher.result() for watcher in watchers] == [[TrustSnapshot({"internal": ONE}, "")]] * 5
    assert await follow() == []
    assert registry.get_sample_value("certmount_authority_trust_watchers") == 0


async def test_watch_ends_after_the_longest_time(metrics: AuthorityMetrics, registry: CollectorRegistry) -> None:
    """The client then authenticates again, possibly to another replica."""
    trust = TrustBundles(metrics, longest=timedelta(milliseconds=20))
    trust.set_roots("internal", ONE)
    assert len([bundle async for bundle in trust.watch()]) == 1
    assert registry.get_sample_value("certmount_authority_trust_watchers") == 0


async def test_select_returns_only_the_issuer_and_requested_federations(trust: TrustBundles) -> None:
    """A federation's CA can sign any name, so a pod must request it."""
    trust.set_roots("partner", TWO)
    trust.set_roots("other", TWO)
    assert trust.select("internal", ()) == {"internal": ONE}
    assert trust.select("internal", ("partner",)) == {"internal": ONE, "partner": TWO}


async def test_watcher_receives_shared_issuers_in_a_stable_order(trust: TrustBundles) -> None:
    watch = trust.watch()
    assert (await anext(watch)).shared_issuers == ()
    trust.set_issuers({"b", "a"}, {})
    trust.set_policy("new")
    assert (await anext(watch)).shared_issuers == ("a", "b")
    before = trust.snapshot
    trust.set_issuers(["a", "b"], {})
    assert trust.snapshot is before
    trust.set_roots("partner", TWO)
    bundle = await anext(watch)
    assert (bundle.shared_issuers, bundle.policy_revision) == (("a", "b"), "new")
    await watch.aclose()


async def test_watcher_receives_a_change_of_an_environment(trust: TrustBundles) -> None:
    watch = trust.watch()
    await anext(watch)
    for directory in ("https://ca.example/staging", "https://ca.example/directory"):
        environments = {"internal": "internal", "letsencrypt": directory}
        trust.set_issuers([], environments)
        assert (await anext(watch)).environments == environments
    await watch.aclose()


async def test_watcher_that_is_no_node_needs_no_acknowledgement(trust: TrustBundles) -> None:
    controller, node = trust.watch(), trust.watch("node-a")
    await anext(controller)
    await anext(node)
    assert trust.nodes == {"node-a"}
    await controller.aclose()
    await node.aclose()


async def test_error_lists_all_unknown_federations(trust: TrustBundles) -> None:
    trust.set_roots("partner", TWO)
    with pytest.raises(CertmountError) as refusal:
        trust.select("internal", ("a", "partner", "b"))
    assert refusal.value.reason is Reason.FEDERATION_NOT_FOUND
    assert [fault.problem for fault in refusal.value.faults if isinstance(fault, Fault)] == [
        "the authority has no root set named a",
        "the authority has no root set named b",
    ]
    assert "use one of internal, partner" in str(refusal.value)


async def test_select_fails_while_the_roots_of_the_issuer_are_unknown(trust: TrustBundles) -> None:
    """The pod could not verify its own certificate."""
    with pytest.raises(CertmountError, match="the roots of issuer acme are not known yet") as refusal:
        trust.select("acme", ())
    assert refusal.value.retryable


async def test_directory_publisher_writes_only_changed_files(tmp_path: Path) -> None:
    publisher, file = DirectoryPublisher(tmp_path), tmp_path / "root.crt"
    await publisher.publish(b"root", b"own")
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"root", 0o644)
    assert (tmp_path / "authority.crt").read_bytes() == b"own"
    before = file.stat()
    await publisher.publish(b"root", b"own")
    assert file.stat().st_ino == before.st_ino
    file.write_bytes(b"changed by mistake")
    await publisher.publish(b"root", b"own")
    assert file.read_bytes() == b"root"


async def test_publish_failure_is_retryable_and_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CertmountError, match=r"missing/root\.crt: cannot be written") as failure:
        await DirectoryPublisher(tmp_path / "missing").publish(b"root", b"own")
    assert failure.value.retryable
