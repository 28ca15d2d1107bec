"""An authority with another CA than the one of the house: of files, post-quantum, of few names. Over the wire."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from prometheus_client import CollectorRegistry

from csi_driver._proto import authority_pb2
from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.keyring import CAProfile, Keyring, encode_keyring, make_keyring
from csi_driver.authority.server import AuthorityServer
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.integration.authority.world import NAME, Caller, Cluster, World
from tests.support.tokens import TokenIssuer


@dataclass
class OtherWorld(World):
    """With settings of its own."""

    wanted: Mapping[str, Any] = field(default_factory=dict)

    def replica(self, registry: CollectorRegistry) -> AuthorityServer:
        usual = super().replica(CollectorRegistry())
        return AuthorityServer(replace(usual._settings, **self.wanted), usual._surroundings, AuthorityMetrics(registry))


@contextlib.asynccontextmanager
async def served(
    folder: Path, issuer: TokenIssuer, key_type: KeyType = KeyType.EC_P256, **wanted: Any
) -> AsyncIterator[tuple[OtherWorld, Caller]]:
    world = OtherWorld(folder, issuer, Cluster(issuer), key=generate_key(key_type), wanted=wanted)
    async with world.running(), world.channel() as channel:
        yield world, Caller(world, channel)


def verified(answer: authority_pb2.IssueResponse) -> list[x509.Certificate]:
    """The chain, leaf first, as a TLS client of the pod would see it."""
    leaf, *chain = map(x509.load_der_x509_certificate, answer.chain)
    roots = [x509.load_der_x509_certificate(root) for root in answer.trust[DEFAULT_ISSUER].roots]
    verifier = PolicyBuilder().store(Store(roots)).time(utc_now())
    return verifier.build_server_verifier(x509.DNSName(NAME)).verify(leaf, chain)


def put(folder: Path, keyring: Keyring) -> None:
    folder.mkdir(exist_ok=True)
    for name, value in encode_keyring(keyring).items():
        (folder / name).write_bytes(value.reveal())


async def test_a_ca_in_files_signs_and_its_successor_too(tmp_path: Path, issuer: TokenIssuer) -> None:
    """Without a restart, and nothing is written to them; what is wrong with new files leaves the former CA in use."""
    files = tmp_path / "files"
    one, other = make_keyring(utc_now()), make_keyring(utc_now())
    put(files, one)
    async with served(tmp_path, issuer, ca_files=files) as (world, caller):
        assert verified(await caller.issue())[-1] == one.root
        (files / "intermediate.key").write_text("hello")
        await world.server._load_ca()
        assert verified(await caller.issue())[-1] == one.root
        assert world.metric("certmount_ca_refresh_failures_total") == 1
        put(files, other)
        await world.server._load_ca()
        assert verified(await caller.issue())[-1] == other.root
    assert {path.name for path in files.iterdir()} == set(encode_keyring(other))


@pytest.mark.parametrize("kind", [KeyType.ML_DSA_65, KeyType.ED25519, KeyType.RSA_3072])
async def test_the_kind_of_the_cas_keys_does_not_touch_the_nodes(
    kind: KeyType, tmp_path: Path, issuer: TokenIssuer
) -> None:
    """GRPC knows neither ML-DSA nor Ed25519: the nodes' connection has a CA of its own, and pods get what was wanted."""
    async with served(tmp_path, issuer, kind, ca_design=CAProfile(kind)) as (world, caller):
        answer = await caller.issue()
        leaf = x509.load_der_x509_certificate(answer.chain[0])
        assert leaf.public_key() == world.key.public_key()
        if kind is not KeyType.ED25519:  # which the web's rules don't know
            assert len(verified(answer)) == 3


async def test_a_ca_of_few_names_refuses_others(tmp_path: Path, issuer: TokenIssuer) -> None:
    """Policy allows more than the CA: the pod's owner hears which name it is, and what is permitted."""
    permitted = (parse_constraint("dns:default.svc.cluster.local"),)
    async with served(tmp_path, issuer, ca_design=CAProfile(permitted=permitted)) as (world, caller):
        verified(await caller.issue())
        world.policy.write_text(
            "policy: [{match: {namespaces: ['*'], serviceAccounts: ['*']}, allow: {dns: ['*.test']}}]"
        )
        await world.server._policy.load()
        refusal = await caller.refused(csr=world.csr("shop.test"))
        assert refusal.reason == "NameNotAllowed"
        assert "shop.test: the CA's certificate permits dns:default.svc.cluster.local only" in refusal.text
