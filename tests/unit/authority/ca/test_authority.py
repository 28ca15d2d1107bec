"""The internal CA: created once, renewed in time, and never replaced by invalid content."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.certificates import INTERMEDIATE_LIFETIME, ROOT_LIFETIME
from csi_driver.authority.ca.keyring import Keyring, encode_keyring, make_keyring
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import in_background, until
from tests.unit.authority.ca.replicas import authority, loaded, rotate
from tests.unit.authority.clock import Clock
from tests.unit.authority.memory_store import MemoryStore


@pytest.mark.parametrize("replicas", [1, 5])
async def test_ca_is_created_only_at_the_first_start(replicas: int, store: MemoryStore, clock: Clock) -> None:
    """Replicas that start together share it."""
    first = await asyncio.gather(*(authority(store, clock).refresh() for _ in range(replicas)))
    second = await authority(store, clock).refresh()
    assert store.saves == 1
    assert {keyring.intermediate.certificate for keyring in first} == {second.intermediate.certificate}


async def test_intermediate_is_renewed_once_for_all_replicas(store: MemoryStore, clock: Clock) -> None:
    """At two thirds of its lifetime, with the same root."""
    replicas = [authority(store, clock) for _ in range(3)]
    before = [await replica.refresh() for replica in replicas]
    clock.forward(INTERMEDIATE_LIFETIME * 0.67)
    after = await asyncio.gather(*(replica.refresh() for replica in replicas))
    assert store.saves == 2
    assert {keyring.root for keyring in after} == {before[0].root}
    assert len({keyring.intermediate.certificate for keyring in [*before, *after]}) == 2


async def test_stepped_clock_renews_no_intermediate(store: MemoryStore, clock: Clock) -> None:
    """The new one would be valid only in the future, when the clock is right again."""
    offset = timedelta()
    metrics = AuthorityMetrics(CollectorRegistry())
    ca = CertificateAuthority(StoredCA(store), metrics, lambda: clock.utc() + offset, elapsed=clock)
    before = await ca.refresh()
    offset = INTERMEDIATE_LIFETIME * 0.67
    assert (await ca.refresh()).intermediate.certificate == before.intermediate.certificate
    assert store.saves == 1


async def test_invalid_ca_in_the_store_is_never_overwritten(store: MemoryStore, clock: Clock) -> None:
    whole = encode_keyring(make_keyring(clock.utc()))
    store.values = {"root.crt": whole["root.crt"]}
    with pytest.raises(CertmountError) as failure:
        await authority(store, clock).refresh()
    assert failure.value.reason is Reason.INVALID_CA
    assert store.values == {"root.crt": whole["root.crt"]}
    assert store.saves == 0


async def test_ca_keeps_signing_while_the_store_is_unavailable(
    store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi_driver.authority.ca.authority.REFRESH_S", 0)
    registry = CollectorRegistry()
    ca = await loaded(store, clock, registry)
    keyring = ca.current
    refreshed: list[Keyring] = []

    async def on_refresh(keyring: Keyring) -> None:
        refreshed.append(keyring)

    def failures() -> float:
        return registry.get_sample_value("certmount_ca_refresh_failures_total") or 0

    store.unavailable = True
    async with in_background(ca.run(on_refresh)):
        await until(lambda: failures() >= 3, "three failures")
        assert ca.current is keyring
        assert not refreshed
        store.unavailable = False
        await until(lambda: refreshed, "a refresh")


async def test_endless_conflicts_are_a_retryable_error(store: MemoryStore, clock: Clock) -> None:
    replica = authority(store, clock)
    store.conflicting = [{} for _ in range(20)]
    with pytest.raises(CertmountError, match="updates conflicted with other writers") as failure:
        await replica.refresh()
    assert failure.value.retryable


async def test_ca_signs_nothing_before_it_is_loaded(store: MemoryStore, clock: Clock) -> None:
    replica = authority(store, clock)
    assert not replica.usable
    with pytest.raises(CertmountError, match="not loaded yet"):
        _ = replica.current


async def test_expired_intermediate_is_unusable_until_it_is_renewed(store: MemoryStore, clock: Clock) -> None:
    replica = await loaded(store, clock)
    clock.forward(INTERMEDIATE_LIFETIME + timedelta(seconds=1))
    assert not replica.usable
    await replica.refresh()
    assert replica.usable


async def test_expired_root_is_an_error(store: MemoryStore, clock: Clock) -> None:
    """A new root needs the decision of everyone who trusts it, so certmount doesn't create one."""
    await authority(store, clock).refresh()
    clock.forward(ROOT_LIFETIME)
    with pytest.raises(CertmountError, match="expired at"):
        await authority(store, clock).refresh()
    assert store.saves == 1


async def test_expiry_times_are_metrics(store: MemoryStore, clock: Clock) -> None:
    registry = CollectorRegistry()
    await authority(store, clock, registry).refresh()
    for role, life in (("root", ROOT_LIFETIME), ("intermediate", INTERMEDIATE_LIFETIME)):
        value = registry.get_sample_value("certmount_ca_expiry_timestamp_seconds", {"certificate": role})
        assert value == (clock.utc() + life).timestamp()


async def test_unchanged_store_is_not_parsed(store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ca = await loaded(store, clock)
    keyring = await ca.refresh()
    monkeypatch.setattr("csi_driver.authority.ca.sources.parse_ca_state", None)
    assert await ca.refresh() is keyring


async def test_unknown_values_in_the_store_are_kept(store: MemoryStore, clock: Clock) -> None:
    others = {"serving.crt": Secret(b"s"), "note": Secret(b"n")}
    store.values = {**encode_keyring(make_keyring(clock.utc())), **others}
    await authority(store, clock).refresh()
    await rotate(store, clock)
    assert others.items() <= store.values.items()


async def test_ca_in_files_gets_a_new_generation_only_for_new_roots(
    tmp_path: Path, clock: Clock, metrics: AuthorityMetrics
) -> None:

    def put(keyring: Keyring) -> None:
        for name, value in encode_keyring(keyring).items():
            (tmp_path / name).write_bytes(value.reveal())

    first = make_keyring(clock.utc())
    put(first)
    ca = CertificateAuthority(CAFiles(tmp_path, metrics), metrics, clock.utc, elapsed=clock)
    await ca.refresh()
    published = ca.root_set
    assert (await ca.record_lifetime(timedelta(days=900))).roots == first.roots
    put(first.renew_intermediate(clock.utc()))
    await ca.refresh()
    assert ca.root_set == published
    assert ca.current.intermediate.certificate != first.intermediate.certificate
    put(make_keyring(clock.utc()))
    await ca.refresh()
    assert ca.root_set.generation > published.generation


async def test_metric_shows_invalid_content(
    store: MemoryStore, clock: Clock, metrics: AuthorityMetrics, registry: CollectorRegistry, tmp_path: Path
) -> None:
    """Files that are not valid are not an error while there is a previous CA, and count once."""

    def put(values: Mapping[str, Secret[bytes]]) -> None:
        store.put(values)
        for name, value in values.items():
            (tmp_path / name).write_bytes(value.reveal())

    valid = encode_keyring(make_keyring(clock.utc()))
    for source in (CAFiles(tmp_path, metrics), StoredCA(store)):
        put(valid)
        ca = CertificateAuthority(source, metrics, clock.utc, elapsed=clock)
        await ca.refresh()
        assert registry.get_sample_value("certmount_ca_valid") == 1
        put({**valid, "root.crt": Secret(b"?")})
        for _ in range(3):
            with suppress(CertmountError):
                await ca.refresh()
            assert registry.get_sample_value("certmount_ca_valid") == 0
        put(valid)
        await ca.refresh()
        assert registry.get_sample_value("certmount_ca_valid") == 1


async def test_unavailable_store_is_not_invalid_content(
    store: MemoryStore, clock: Clock, registry: CollectorRegistry
) -> None:
    ca = await loaded(store, clock, registry)
    store.unavailable = True
    with pytest.raises(CertmountError):
        await ca.refresh()
    assert registry.get_sample_value("certmount_ca_valid") == 1


async def test_metric_shows_that_there_is_no_valid_ca_yet(
    clock: Clock, metrics: AuthorityMetrics, registry: CollectorRegistry, tmp_path: Path
) -> None:
    ca = CertificateAuthority(CAFiles(tmp_path, metrics), metrics, clock.utc, elapsed=clock)
    with pytest.raises(CertmountError):
        await ca.refresh()
    assert registry.get_sample_value("certmount_ca_valid") == 0


async def test_expiring_certificate_is_logged_once_a_day(store: MemoryStore, clock: Clock) -> None:
    offline = replace(make_keyring(clock.utc()), root_key=None)
    store.values = encode_keyring(offline)
    ca = authority(store, clock)
    with structlog.testing.capture_logs() as logs:
        for hours in (0, 300 * 24, 23, 1):
            clock.forward(timedelta(hours=hours))
            await ca.refresh()
    warnings = [entry for entry in logs if "expires soon" in entry["event"]]
    assert [entry["certificate"] for entry in warnings] == ["intermediate.crt"] * 2
