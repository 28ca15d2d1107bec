# ruff: noqa: ASYNC240  # a test that looks at files has nothing else to run meanwhile
"""Root sets of federations: files are followed by content, and invalid content never replaces valid roots."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import structlog
from cryptography import x509
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.certificates import Leaf, sign_leaf
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.authority.trust.federation import FederationDirectory
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType, Usage
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.clock import Clock

CLOCK = Clock()
ONE, TWO = (make_keyring(CLOCK.utc()) for _ in range(2))


@pytest.fixture
def trust(metrics: AuthorityMetrics) -> TrustBundles:
    return TrustBundles(metrics)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def federations(tmp_path: Path, trust: TrustBundles, metrics: AuthorityMetrics, clock: Clock) -> FederationDirectory:
    return FederationDirectory(tmp_path, trust, metrics, clock, ("internal", "step"))


def put(directory: Path, name: str, *certificates: x509.Certificate) -> None:
    (directory / name).write_bytes(encode_certificates(certificates))


def rejections(registry: CollectorRegistry) -> float:
    return registry.get_sample_value("certmount_federation_reload_failures_total") or 0.0


async def test_each_certificate_file_is_a_root_set(
    federations: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    """Its name without .crt or .pem is the name of the set. Other files are ignored."""
    put(tmp_path, "partner.crt", ONE.root, TWO.root, ONE.root)
    put(tmp_path, "eu.shop.pem", TWO.root)
    (tmp_path / "README.md").write_text("hello")
    await federations.load()
    sets = trust.snapshot.sets
    assert {name: each.roots for name, each in sets.items()} == {
        "partner": (*ONE.roots_der, *TWO.roots_der),
        "eu.shop": TWO.roots_der,
    }
    assert {each.generation for each in sets.values()} == {int(CLOCK.now)}


async def test_changed_roots_get_a_higher_generation(
    federations: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    """Even in the same second. The same roots in changed content are no change."""
    put(tmp_path, "partner.crt", ONE.root)
    await federations.load()
    first = trust.snapshot
    (tmp_path / "partner.crt").write_bytes(b"# a comment\n" + encode_certificates([ONE.root]))
    await federations.load()
    assert trust.snapshot is first
    put(tmp_path, "partner.crt", TWO.root)
    await federations.load()
    assert trust.snapshot.sets["partner"].roots == TWO.roots_der
    assert trust.snapshot.sets["partner"].generation == first.sets["partner"].generation + 1


async def test_removed_file_removes_its_set(
    federations: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    """If the set returns, with either suffix, its generation is higher."""
    put(tmp_path, "partner.crt", ONE.root)
    await federations.load()
    before = trust.snapshot.sets["partner"].generation
    (tmp_path / "partner.crt").rename(tmp_path / "partner")
    await federations.load()
    assert trust.snapshot.sets == {}
    put(tmp_path, "partner.pem", ONE.root)
    await federations.load()
    assert trust.snapshot.sets["partner"].generation > before


BAD = {
    "empty": b"",
    "no PEM": b"hello",
    "half": encode_certificates([ONE.root])[:300],
    "long": b"x" * (256 * 1024 + 1),
    "many": encode_certificates([make_keyring(CLOCK.utc()).root for _ in range(11)]),
}


@pytest.mark.parametrize("bad", BAD)
async def test_invalid_content_keeps_the_previous_roots(
    bad: str, federations: FederationDirectory, tmp_path: Path, trust: TrustBundles, registry: CollectorRegistry
) -> None:
    """It is counted once for each content."""
    put(tmp_path, "partner.crt", ONE.root)
    await federations.load()
    (tmp_path / "partner.crt").write_bytes(BAD[bad])
    for _ in range(3):
        await federations.load()
    assert trust.snapshot.sets["partner"].roots == ONE.roots_der
    assert rejections(registry) == 1
    put(tmp_path, "partner.crt", TWO.root)
    await federations.load()
    assert trust.snapshot.sets["partner"].roots == TWO.roots_der
    assert rejections(registry) == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)])
async def test_file_that_is_not_regular_is_rejected_alone(
    make: Callable[[Path], None],
    federations: FederationDirectory,
    tmp_path: Path,
    trust: TrustBundles,
    registry: CollectorRegistry,
) -> None:
    """The other files of the directory stay in use and are still followed."""
    make(tmp_path / "special.crt")
    for keyring in (ONE, TWO):
        put(tmp_path, "partner.crt", keyring.root)
        await federations.load()
        assert {name: each.roots for name, each in trust.snapshot.sets.items()} == {"partner": keyring.roots_der}
    assert rejections(registry) == 1


async def test_certificate_that_is_not_a_ca_is_rejected(
    federations: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    """Otherwise a pod would accept its holder under any name."""
    put(tmp_path, "partner.crt", ONE.root, leaf())
    with structlog.testing.capture_logs() as logs:
        await federations.load()
    assert trust.snapshot.sets == {}
    assert "partner.crt: certificate 2 is not a CA certificate" in logs[0]["error"]


@pytest.mark.parametrize("name", ["internal.crt", "step.pem", "Big.crt", ".crt", "a b.crt", "-a.pem"])
async def test_invalid_name_or_name_of_an_issuer_is_rejected(
    name: str, federations: FederationDirectory, tmp_path: Path, trust: TrustBundles, registry: CollectorRegistry
) -> None:
    """A file must not replace an issuer's own roots."""
    put(tmp_path, name, ONE.root)
    await federations.load()
    assert (trust.snapshot.sets, rejections(registry)) == ({}, 1)


async def test_second_file_for_a_set_is_rejected(
    federations: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    """It is used when the first file is removed."""
    put(tmp_path, "partner.crt", ONE.root)
    put(tmp_path, "partner.pem", TWO.root)
    await federations.load()
    assert trust.snapshot.sets["partner"].roots == ONE.roots_der
    (tmp_path / "partner.crt").unlink()
    await federations.load()
    assert trust.snapshot.sets["partner"].roots == TWO.roots_der


async def test_unreadable_directory_keeps_all_sets(
    federations: FederationDirectory, tmp_path: Path, trust: TrustBundles, registry: CollectorRegistry
) -> None:
    """It is counted once. An optional ConfigMap that appears later is used."""
    put(tmp_path, "partner.crt", ONE.root)
    await federations.load()
    tmp_path.rename(tmp_path.with_name("away"))
    for _ in range(2):
        await federations.load()
    assert trust.snapshot.sets["partner"].roots == ONE.roots_der
    assert rejections(registry) == 1
    tmp_path.with_name("away").rename(tmp_path)
    put(tmp_path, "partner.crt", TWO.root)
    await federations.load()
    assert trust.snapshot.sets["partner"].roots == TWO.roots_der


async def test_files_are_read_through_the_link_of_the_kubelet(
    federations: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    for number, keyring in enumerate((ONE, TWO)):
        state = tmp_path / f"..{number}"
        state.mkdir()
        put(state, "partner.crt", keyring.root)
        (tmp_path / "..next").symlink_to(state.name)
        (tmp_path / "..next").rename(tmp_path / "..data")
        await federations.load()
        assert trust.snapshot.sets["partner"].roots == keyring.roots_der


async def test_number_of_sets_is_limited(federations: FederationDirectory, tmp_path: Path, trust: TrustBundles) -> None:
    """Every node receives all of them."""
    for number in range(70):
        put(tmp_path, f"set-{number}.crt", ONE.root)
    await federations.load()
    assert len(trust.snapshot.sets) == 64


def leaf() -> x509.Certificate:
    key = generate_key(KeyType.EC_P256)
    return sign_leaf(
        Leaf(key.public_key(), Names.of([DNSName.parse("a.test")]), timedelta(hours=1), (Usage.SERVER,)),
        ONE.intermediate,
        CLOCK.utc(),
    )
