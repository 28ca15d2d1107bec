# ruff: noqa: ASYNC240  # a test that looks at files has nothing else to run meanwhile
"""Further roots from a folder: followed by content, and never replaced by something worse."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import structlog
from cryptography import x509
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.ca.leaf import Leaf, sign_leaf
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
def folder(tmp_path: Path, trust: TrustBundles, metrics: AuthorityMetrics, clock: Clock) -> FederationDirectory:
    return FederationDirectory(tmp_path, trust, metrics, clock, ("internal", "step"))


def put(folder: Path, name: str, *certificates: x509.Certificate) -> None:
    (folder / name).write_bytes(encode_certificates(certificates))


def refusals(registry: CollectorRegistry) -> float:
    return registry.get_sample_value("certmount_federation_reload_failures_total") or 0.0


async def test_each_file_is_a_set(folder: FederationDirectory, tmp_path: Path, trust: TrustBundles) -> None:
    """By its name without .crt or .pem; whatever else lies there is not looked at."""
    put(tmp_path, "partner.crt", ONE.root, TWO.root, ONE.root)
    put(tmp_path, "eu.shop.pem", TWO.root)
    (tmp_path / "README.md").write_text("hello")
    await folder.load()
    sets = trust.snapshot.sets
    assert {name: each.roots for name, each in sets.items()} == {
        "partner": (*ONE.roots_der, *TWO.roots_der),
        "eu.shop": TWO.roots_der,
    }
    assert {each.generation for each in sets.values()} == {int(CLOCK.now)}


async def test_another_content_is_a_newer_set(folder: FederationDirectory, tmp_path: Path, trust: TrustBundles) -> None:
    """Also in the same second, and when the clock was set back; the same roots written anew are none."""
    put(tmp_path, "partner.crt", ONE.root)
    await folder.load()
    first = trust.snapshot
    (tmp_path / "partner.crt").write_bytes(b"# a comment\n" + encode_certificates([ONE.root]))
    await folder.load()
    assert trust.snapshot is first
    put(tmp_path, "partner.crt", TWO.root)
    await folder.load()
    assert trust.snapshot.sets["partner"].roots == TWO.roots_der
    assert trust.snapshot.sets["partner"].generation == first.sets["partner"].generation + 1


async def test_a_file_that_goes_takes_its_set_along(
    folder: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    """And is newer than before when it comes back, under whichever suffix."""
    put(tmp_path, "partner.crt", ONE.root)
    await folder.load()
    before = trust.snapshot.sets["partner"].generation
    (tmp_path / "partner.crt").rename(tmp_path / "partner")
    await folder.load()
    assert trust.snapshot.sets == {}
    put(tmp_path, "partner.pem", ONE.root)
    await folder.load()
    assert trust.snapshot.sets["partner"].generation > before


BAD = {
    "empty": b"",
    "no PEM": b"hello",
    "half": encode_certificates([ONE.root])[:300],
    "long": b"x" * (256 * 1024 + 1),
    "many": encode_certificates([make_keyring(CLOCK.utc()).root for _ in range(11)]),
}


@pytest.mark.parametrize("bad", BAD)
async def test_a_bad_content_keeps_the_former_roots(
    bad: str, folder: FederationDirectory, tmp_path: Path, trust: TrustBundles, registry: CollectorRegistry
) -> None:
    """It is counted once for each content, and a good one heals it."""
    put(tmp_path, "partner.crt", ONE.root)
    await folder.load()
    (tmp_path / "partner.crt").write_bytes(BAD[bad])
    for _ in range(3):
        await folder.load()
    assert trust.snapshot.sets["partner"].roots == ONE.roots_der
    assert refusals(registry) == 1
    put(tmp_path, "partner.crt", TWO.root)
    await folder.load()
    assert trust.snapshot.sets["partner"].roots == TWO.roots_der
    assert refusals(registry) == 1


async def test_a_certificate_that_is_no_authority_is_refused(
    folder: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    """A pod would take whoever has its key for anyone; the words name file and certificate."""
    put(tmp_path, "partner.crt", ONE.root, leaf())
    with structlog.testing.capture_logs() as logs:
        await folder.load()
    assert trust.snapshot.sets == {}
    assert "partner.crt: certificate 2 is not a CA certificate" in logs[0]["error"]


@pytest.mark.parametrize("name", ["internal.crt", "step.pem", "Big.crt", ".crt", "a b.crt", "-a.pem"])
async def test_a_name_that_cannot_be_asked_for_or_is_an_issuers_is_refused(
    name: str, folder: FederationDirectory, tmp_path: Path, trust: TrustBundles, registry: CollectorRegistry
) -> None:
    """A file must not take the place of an issuer's own roots."""
    put(tmp_path, name, ONE.root)
    await folder.load()
    assert (trust.snapshot.sets, refusals(registry)) == ({}, 1)


async def test_two_files_of_one_set_are_refused(folder: FederationDirectory, tmp_path: Path, trust: TrustBundles) -> None:
    """The second of them; and taken when the first is gone."""
    put(tmp_path, "partner.crt", ONE.root)
    put(tmp_path, "partner.pem", TWO.root)
    await folder.load()
    assert trust.snapshot.sets["partner"].roots == ONE.roots_der
    (tmp_path / "partner.crt").unlink()
    await folder.load()
    assert trust.snapshot.sets["partner"].roots == TWO.roots_der


async def test_a_folder_that_cannot_be_read_changes_nothing(
    folder: FederationDirectory, tmp_path: Path, trust: TrustBundles, registry: CollectorRegistry
) -> None:
    """Counted once while it lasts; an optional ConfigMap that comes later is taken."""
    put(tmp_path, "partner.crt", ONE.root)
    await folder.load()
    tmp_path.rename(tmp_path.with_name("away"))
    for _ in range(2):
        await folder.load()
    assert trust.snapshot.sets["partner"].roots == ONE.roots_der
    assert refusals(registry) == 1
    tmp_path.with_name("away").rename(tmp_path)
    put(tmp_path, "partner.crt", TWO.root)
    await folder.load()
    assert trust.snapshot.sets["partner"].roots == TWO.roots_der


async def test_files_are_read_as_the_kubelet_swaps_them(
    folder: FederationDirectory, tmp_path: Path, trust: TrustBundles
) -> None:
    """All of one state: through the link that it renames."""
    for number, keyring in enumerate((ONE, TWO)):
        state = tmp_path / f"..{number}"
        state.mkdir()
        put(state, "partner.crt", keyring.root)
        (tmp_path / "..next").symlink_to(state.name)
        (tmp_path / "..next").rename(tmp_path / "..data")
        await folder.load()
        assert trust.snapshot.sets["partner"].roots == keyring.roots_der


async def test_sets_are_bounded(folder: FederationDirectory, tmp_path: Path, trust: TrustBundles) -> None:
    """A folder of thousands is a mistake, and every node would be told of it."""
    for number in range(70):
        put(tmp_path, f"set-{number}.crt", ONE.root)
    await folder.load()
    assert len(trust.snapshot.sets) == 64


def leaf() -> x509.Certificate:
    key = generate_key(KeyType.EC_P256)
    return sign_leaf(
        Leaf(key.public_key(), Names.of([DNSName.parse("a.test")]), timedelta(hours=1), (Usage.SERVER,)),
        ONE.intermediate,
        CLOCK.utc(),
    )
