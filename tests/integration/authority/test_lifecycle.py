"""The lifecycle of an authority: start, serving certificate, streams and stop; CA rotation; and CAs in files or with other keys."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from csi_driver._proto import authority_pb2
from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.keyring import CAProfile, Keyring, encode_keyring, make_keyring
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from tests.integration.authority.world import NAME, SERVING_NAME, Caller, Cluster, World
from tests.support.tokens import TokenIssuer
from tests.support.waiting import until


async def serving_certificate(world: World) -> x509.Certificate:
    context = ssl.create_default_context(cafile=str(world.ca / "authority.crt"))
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", world.server.port, ssl=context, server_hostname=SERVING_NAME)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return x509.load_der_x509_certificate(der)


async def test_serving_certificate_is_renewed_without_a_restart(world: World, caller: Caller) -> None:
    before = await serving_certificate(world)
    assert before.not_valid_after_utc - utc_now() <= timedelta(hours=24)
    stream = caller.watch()
    await stream.read()
    assert await serving_certificate(world) == before
    world.server._serving._renew_at = utc_now()
    await world.server._load_ca()
    assert (await serving_certificate(world)).public_key() != before.public_key()
    await caller.issue()
    world.server._trust.set_roots(DEFAULT_ISSUER, RootSet((b"x",), 1))
    assert list(_roots(await stream.read())) == [b"x"]


async def test_serving_key_is_not_stored(world: World) -> None:
    certificate = await serving_certificate(world)
    assert {path.name for path in world.ca.iterdir()} == {"ca.json", "root.crt", "authority.crt", ".lock"}
    assert [name.text for name in names_of(certificate.extensions)] == [SERVING_NAME]


async def test_stream_delivers_the_roots_of_a_replaced_ca(world: World, caller: Caller) -> None:
    stream = caller.watch()
    first = parse_certificates(_roots(await stream.read()), "roots")
    other = make_keyring(utc_now())
    store = world.server._environment.ca_store
    assert await store.save(encode_keyring(other), await store.load())
    await world.server._load_ca()
    second = parse_certificates(_roots(await stream.read()), "roots")
    assert first != second == (other.root,)
    assert (world.ca / "root.crt").read_bytes() == other.roots_pem
    assert tuple((await caller.issue()).trust[DEFAULT_ISSUER].roots) == other.roots_der


@pytest.mark.parametrize("calls", ["unary", "stream"])
async def test_stop_finishes_calls_in_progress_and_accepts_no_new_calls(world: World) -> None:
    async with world.channel() as channel, world.channel() as another:
        caller = Caller(world, channel)
        stream = caller.watch()
        await stream.read()
        world.reviewer.gate.clear()
        in_progress = asyncio.create_task(caller.issue())
        await until(lambda: world.metric("certmount_authority_issues_in_flight") == 1, "the call")
        world.stop.set()
        await until(lambda: "stopping" in world.server.unready(), "the stop")
        assert await stream.read() == grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        failure = await Caller(world, another).rejected()
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        world.reviewer.gate.set()
        assert len((await in_progress).chain) == 2


async def test_authority_can_be_stopped_before_it_serves(idle_world: World) -> None:
    idle_world.cluster.unavailable = True
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(idle_world.server.run(idle_world.stop))
        failures = "certmount_token_verification_failures_total"
        await until(lambda: idle_world.metric(failures, source="keys") > 0, "the first attempt")
        idle_world.stop.set()


async def test_expired_intermediate_makes_the_authority_unready(world: World) -> None:
    world.server._ca._clock = lambda: utc_now() + timedelta(days=366)
    assert world.server.unready() == ["the internal CA is not loaded, outdated or expired"]


async def test_port_in_use_fails_the_start(idle_world: World) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        idle_world.server._settings = replace(idle_world.server._settings, listen=address)
        with pytest.raises(ExceptionGroup) as failure:
            await idle_world.server.run(idle_world.stop)
    assert failure.group_contains(OSError, match=f"--listen {address}: cannot listen on it")


def _roots(bundle: authority_pb2.TrustBundle) -> Sequence[bytes]:
    return bundle.sets[DEFAULT_ISSUER].roots


@contextlib.asynccontextmanager
async def running(
    folder: Path, issuer: TokenIssuer, key_type: KeyType = KeyType.EC_P256, **settings: Any
) -> AsyncIterator[tuple[World, Caller]]:
    world = World(folder, issuer, Cluster(issuer), key=generate_key(key_type), settings=settings)
    async with world.running(), world.channel() as channel:
        yield world, Caller(world, channel)


def verified_chain(answer: authority_pb2.IssueResponse) -> list[x509.Certificate]:
    leaf, *chain = map(x509.load_der_x509_certificate, answer.chain)
    roots = [x509.load_der_x509_certificate(root) for root in answer.trust[DEFAULT_ISSUER].roots]
    verifier = PolicyBuilder().store(Store(roots)).time(utc_now())
    return verifier.build_server_verifier(x509.DNSName(NAME)).verify(leaf, chain)


def write_files(folder: Path, keyring: Keyring) -> None:
    folder.mkdir(exist_ok=True)
    for name, value in encode_keyring(keyring).items():
        (folder / name).write_bytes(value.reveal())


async def test_ca_in_files_can_be_replaced_without_a_restart(tmp_path: Path, issuer: TokenIssuer) -> None:
    files = tmp_path / "files"
    one, other = make_keyring(utc_now()), make_keyring(utc_now())
    write_files(files, one)
    async with running(tmp_path, issuer, ca_files=files) as (world, caller):
        assert verified_chain(await caller.issue())[-1] == one.root
        (files / "intermediate.key").write_text("hello")
        await world.server._load_ca()
        assert verified_chain(await caller.issue())[-1] == one.root
        assert world.metric("certmount_ca_refresh_failures_total") == 1
        write_files(files, other)
        await world.server._load_ca()
        assert verified_chain(await caller.issue())[-1] == other.root
    assert {path.name for path in files.iterdir()} == set(encode_keyring(other))


@pytest.mark.parametrize("kind", [KeyType.ML_DSA_65, KeyType.ED25519, KeyType.RSA_3072])
async def test_ca_key_type_does_not_affect_node_connections(kind: KeyType, tmp_path: Path, issuer: TokenIssuer) -> None:
    """Node drivers verify another CA, because gRPC supports neither ML-DSA nor Ed25519."""
    async with running(tmp_path, issuer, kind, ca_profile=CAProfile(kind)) as (world, caller):
        answer = await caller.issue()
        leaf = x509.load_der_x509_certificate(answer.chain[0])
        assert leaf.public_key() == world.key.public_key()
        if kind is not KeyType.ED25519:  # the verifier does not support it
            assert len(verified_chain(answer)) == 3


async def test_name_outside_the_cas_name_constraints_is_rejected(tmp_path: Path, issuer: TokenIssuer) -> None:
    permitted = (parse_constraint("dns:default.svc.cluster.local"),)
    async with running(tmp_path, issuer, ca_profile=CAProfile(permitted=permitted)) as (world, caller):
        verified_chain(await caller.issue())
        world.policy.write_text(
            "policy: [{match: {namespaces: ['*'], serviceAccounts: ['*']}, allow: {dns: ['*.test']}}]"
        )
        await world.server._policy.load()
        failure = await caller.rejected(csr=world.csr("shop.test"))
        assert failure.reason == "NameNotAllowed"
        assert "shop.test: the CA's certificate permits only dns:default.svc.cluster.local" in failure.text


class CAClock:
    """The clock of the CA. After each step the authority reads its store, as it does every five seconds."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ahead = timedelta()
        world.server._ca._clock = lambda: utc_now() + self._ahead
        world.server._ca._elapsed = lambda: time.monotonic() + self._ahead.total_seconds()
        world.server._ca._started = utc_now(), time.monotonic()

    async def advance(self, step: timedelta = timedelta()) -> None:
        self._ahead += step
        for _ in range(3):
            await self._world.server._load_ca()


async def test_rotation_waits_for_the_nodes_acknowledgements(world: World, caller: Caller) -> None:
    """The node gets both roots first. The new CA signs after the node has acknowledged them twice. The former root is
    removed when all its certificates have expired.
    """
    clock, phase, day = CAClock(world), timedelta(seconds=41), timedelta(days=1)
    stream = caller.watch()
    first = (await stream.read()).sets[DEFAULT_ISSUER]
    await acknowledge(caller, first.generation)
    old = issuer_of(await caller.issue(duration=timedelta(hours=1)))
    following = make_keyring(utc_now())
    store = world.server._environment.ca_store
    await StoredCA(store).change(utc_now(), lambda held: held.begin_rotation(following, int(utc_now().timestamp())))
    await clock.advance()
    both = (await stream.read()).sets[DEFAULT_ISSUER]
    assert list(both.roots) == [*first.roots, *following.roots_der]
    await acknowledge(caller, both.generation)
    await clock.advance(phase)
    again = (await stream.read()).sets[DEFAULT_ISSUER]
    assert (list(again.roots), again.generation > both.generation) == (list(both.roots), True)
    assert issuer_of(await caller.issue(duration=timedelta(hours=1))) == old
    await acknowledge(caller, again.generation)
    await clock.advance()
    answer = await caller.issue(duration=timedelta(hours=1))
    assert issuer_of(answer) == following.intermediate.certificate.subject
    assert list(answer.trust[DEFAULT_ISSUER].roots) == list(both.roots)
    await clock.advance(phase)
    assert list((await caller.issue(duration=timedelta(hours=1))).trust[DEFAULT_ISSUER].roots) == list(both.roots)
    await clock.advance(day)
    last = (await stream.read()).sets[DEFAULT_ISSUER]
    assert list(last.roots) == list(following.roots_der)
    assert (world.ca / "root.crt").read_bytes() == following.roots_pem


async def acknowledge(caller: Caller, generation: int) -> None:
    request = authority_pb2.ConfirmTrustRequest(set=DEFAULT_ISSUER, generation=generation)
    await caller._stub.ConfirmTrust(request, metadata=caller.bearer(), timeout=10)


def issuer_of(answer: authority_pb2.IssueResponse) -> x509.Name:
    return x509.load_der_x509_certificate(answer.chain[0]).issuer
