"""Authorities with a CA in files, other key types or name constraints."""

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
class CustomWorld(World):
    """An authority with other settings."""

    settings: Mapping[str, Any] = field(default_factory=dict)

    def replica(self, registry: CollectorRegistry) -> AuthorityServer:
        default = super().replica(CollectorRegistry())
        settings = replace(default._settings, **self.settings)
        return AuthorityServer(settings, default._environment, AuthorityMetrics(registry))


@contextlib.asynccontextmanager
async def running(
    folder: Path, issuer: TokenIssuer, key_type: KeyType = KeyType.EC_P256, **settings: Any
) -> AsyncIterator[tuple[CustomWorld, Caller]]:
    world = CustomWorld(folder, issuer, Cluster(issuer), key=generate_key(key_type), settings=settings)
    async with world.running(), world.channel() as channel:
        yield world, Caller(world, channel)


def verified(answer: authority_pb2.IssueResponse) -> list[x509.Certificate]:
    leaf, *chain = map(x509.load_der_x509_certificate, answer.chain)
    roots = [x509.load_der_x509_certificate(root) for root in answer.trust[DEFAULT_ISSUER].roots]
    verifier = PolicyBuilder().store(Store(roots)).time(utc_now())
    return verifier.build_server_verifier(x509.DNSName(NAME)).verify(leaf, chain)


def write(folder: Path, keyring: Keyring) -> None:
    folder.mkdir(exist_ok=True)
    for name, value in encode_keyring(keyring).items():
        (folder / name).write_bytes(value.reveal())


async def test_ca_in_files_can_be_replaced_without_a_restart(tmp_path: Path, issuer: TokenIssuer) -> None:
    files = tmp_path / "files"
    one, other = make_keyring(utc_now()), make_keyring(utc_now())
    write(files, one)
    async with running(tmp_path, issuer, ca_files=files) as (world, caller):
        assert verified(await caller.issue())[-1] == one.root
        (files / "intermediate.key").write_text("hello")
        await world.server._load_ca()
        assert verified(await caller.issue())[-1] == one.root
        assert world.metric("certmount_ca_refresh_failures_total") == 1
        write(files, other)
        await world.server._load_ca()
        assert verified(await caller.issue())[-1] == other.root
    assert {path.name for path in files.iterdir()} == set(encode_keyring(other))


@pytest.mark.parametrize("kind", [KeyType.ML_DSA_65, KeyType.ED25519, KeyType.RSA_3072])
async def test_ca_key_type_does_not_affect_the_nodes_connections(
    kind: KeyType, tmp_path: Path, issuer: TokenIssuer
) -> None:
    """Node drivers verify another CA, because gRPC supports neither ML-DSA nor Ed25519."""
    async with running(tmp_path, issuer, kind, ca_profile=CAProfile(kind)) as (world, caller):
        answer = await caller.issue()
        leaf = x509.load_der_x509_certificate(answer.chain[0])
        assert leaf.public_key() == world.key.public_key()
        if kind is not KeyType.ED25519:  # the verifier does not support it
            assert len(verified(answer)) == 3


async def test_name_outside_the_cas_name_constraints_is_rejected(tmp_path: Path, issuer: TokenIssuer) -> None:
    """Although the policy allows it. The error names the name and the constraints."""
    permitted = (parse_constraint("dns:default.svc.cluster.local"),)
    async with running(tmp_path, issuer, ca_profile=CAProfile(permitted=permitted)) as (world, caller):
        verified(await caller.issue())
        world.policy.write_text(
            "policy: [{match: {namespaces: ['*'], serviceAccounts: ['*']}, allow: {dns: ['*.test']}}]"
        )
        await world.server._policy.load()
        failure = await caller.rejected(csr=world.csr("shop.test"))
        assert failure.reason == "NameNotAllowed"
        assert "shop.test: the CA's certificate permits only dns:default.svc.cluster.local" in failure.text
