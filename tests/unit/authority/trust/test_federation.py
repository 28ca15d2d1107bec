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


class World:
    """A directory of federations, and what was read from it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.registry = directory, CollectorRegistry()
        metrics = AuthorityMetrics(self.registry)
        self.trust = TrustBundles(metrics)
        self.federations = FederationDirectory(directory, self.trust, metrics, Clock(), ("internal", "step"))

    async def load(self, name: str = "", *certificates: x509.Certificate) -> None:
        """Write a file, if there is a name, and load the directory."""
        if name:
            (self.directory / name).write_bytes(encode_certificates(certificates))
        await self.federations.load()

    @property
    def roots(self) -> dict[str, tuple[bytes, ...]]:
        return {name: tuple(each.roots) for name, each in self.trust.snapshot.sets.items()}

    @property
    def generation(self) -> int:
        return self.trust.snapshot.sets["partner"].generation

    @property
    def rejections(self) -> float:
        return self.registry.get_sample_value("certmount_federation_reload_failures_total") or 0.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_each_certificate_file_is_a_root_set(world: World) -> None:
    """Its name without .crt or .pem is the name of the set. Other files are ignored."""
    (world.directory / "README.md").write_text("hello")
    await world.load("partner.crt", ONE.root, TWO.root, ONE.root)
    await world.load("eu-shop.pem", TWO.root)
    assert world.roots == {"partner": (*ONE.roots_der, *TWO.roots_der), "eu-shop": TWO.roots_der}
    assert {each.generation for each in world.trust.snapshot.sets.values()} == {int(CLOCK.now)}


async def test_changed_roots_get_a_higher_generation(world: World) -> None:
    await world.load("partner.crt", ONE.root)
    first, generation = world.trust.snapshot, world.generation
    (world.directory / "partner.crt").write_bytes(b"# a comment\n" + encode_certificates([ONE.root]))
    await world.load()
    assert world.trust.snapshot is first
    await world.load("partner.crt", TWO.root)
    assert (world.roots, world.generation) == ({"partner": TWO.roots_der}, generation + 1)


async def test_removed_file_removes_its_set(world: World) -> None:
    """If the set returns, with either suffix, its generation is higher."""
    await world.load("partner.crt", ONE.root)
    before = world.generation
    (world.directory / "partner.crt").rename(world.directory / "partner")
    await world.load()
    assert world.roots == {}
    await world.load("partner.pem", ONE.root)
    assert world.generation > before


BAD = {
    "empty": b"", "no PEM": b"hello", "half": encode_certificates([ONE.root])[:300], "long": b"x" * (256 * 1024 + 1),
    "many": encode_certificates([make_keyring(CLOCK.utc()).root for _ in range(11)]),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
async def test_invalid_content_keeps_the_previous_roots(bad: str, world: World) -> None:
    """It is counted once for each content."""
    await world.load("partner.crt", ONE.root)
    (world.directory / "partner.crt").write_bytes(BAD[bad])
    for _ in range(3):
        await world.load()
    assert (world.roots, world.rejections) == ({"partner": ONE.roots_der}, 1)
    await world.load("partner.crt", TWO.root)
    assert (world.roots, world.rejections) == ({"partner": TWO.roots_der}, 1)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)])
async def test_file_that_is_not_regular_is_rejected_alone(make: Callable[[Path], None], world: World) -> None:
    """The other files of the directory stay in use and are still followed."""
    make(world.directory / "special.crt")
    for keyring in (ONE, TWO):
        await world.load("partner.crt", keyring.root)
        assert (world.roots, world.rejections) == ({"partner": keyring.roots_der}, 1)


async def test_certificate_that_is_not_a_ca_is_rejected(world: World) -> None:
    """Otherwise a pod would accept its holder under any name."""
    key, names = generate_key(KeyType.EC_P256), Names.of([DNSName.parse("a.test")])
    leaf = Leaf(key.public_key(), names, timedelta(hours=1), (Usage.SERVER,))
    with structlog.testing.capture_logs() as logs:
        await world.load("partner.crt", ONE.root, sign_leaf(leaf, ONE.intermediate, CLOCK.utc()))
    assert world.roots == {}
    assert "partner.crt: certificate 2 is not a CA certificate" in logs[0]["error"]


@pytest.mark.parametrize("name", ["internal.crt", "step.pem", "Big.crt", ".crt", "a b.crt", "-a.pem", "a.b.crt"])
async def test_invalid_name_or_name_of_an_issuer_is_rejected(name: str, world: World) -> None:
    """A file must not replace an issuer's own roots."""
    await world.load(name, ONE.root)
    assert (world.roots, world.rejections) == ({}, 1)


async def test_file_name_that_is_not_utf8_is_rejected_alone(world: World) -> None:
    (world.directory / os.fsdecode(b"\xff.crt")).write_bytes(encode_certificates([TWO.root]))
    await world.load("partner.crt", ONE.root)
    assert (world.rejections, [*world.roots]) == (1, ["partner"])


async def test_second_file_for_a_set_is_rejected(world: World) -> None:
    await world.load("partner.crt", ONE.root)
    await world.load("partner.pem", TWO.root)
    assert world.roots == {"partner": ONE.roots_der}
    (world.directory / "partner.crt").unlink()
    await world.load()
    assert world.roots == {"partner": TWO.roots_der}


async def test_unreadable_directory_keeps_all_sets(world: World) -> None:
    """It is counted once. An optional ConfigMap that appears later is used."""
    await world.load("partner.crt", ONE.root)
    away = world.directory.rename(world.directory.with_name("away"))
    for _ in range(2):
        await world.load()
    assert (world.roots, world.rejections) == ({"partner": ONE.roots_der}, 1)
    away.rename(world.directory)
    await world.load("partner.crt", TWO.root)
    assert world.roots == {"partner": TWO.roots_der}


async def test_files_are_read_through_the_link_of_the_kubelet(world: World) -> None:
    for number, keyring in enumerate((ONE, TWO)):
        state, link = world.directory / f"..{number}", world.directory / "..next"
        state.mkdir()
        (state / "partner.crt").write_bytes(encode_certificates([keyring.root]))
        link.symlink_to(state.name)
        link.rename(world.directory / "..data")
        await world.load()
        assert world.roots == {"partner": keyring.roots_der}


async def test_number_of_sets_is_limited(world: World) -> None:
    """Every node receives all of them. The roots of a set that exists can still change."""
    for number in range(70):
        (world.directory / f"set-{number}.crt").write_bytes(encode_certificates([ONE.root]))
    await world.load()
    assert len(world.roots) == 64
    await world.load("set-0.crt", TWO.root)
    assert world.roots["set-0"] == TWO.roots_der


async def test_a_set_may_exist_while_its_file_is_invalid_or_the_directory_was_not_read(world: World) -> None:
    """Otherwise, a restart would remove its published roots."""
    assert world.federations.may_contain("partner")
    (world.directory / "partner.crt").write_bytes(b"no certificates")
    await world.load("other.crt", ONE.root)
    assert [world.federations.may_contain(name) for name in ("partner", "other", "unknown")] == [True, True, False]
