"""The lifecycle of an authority: start, readiness, serving certificate, streams, replicas and stop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest
from cryptography import x509

from csi_driver._proto import authority_pb2
from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.keyring import encode_keyring, make_keyring
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.spec import DEFAULT_ISSUER
from tests.integration.authority.world import SERVING_NAME, Caller, World
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
