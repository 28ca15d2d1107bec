"""An authority from its start to its end: readiness, its own certificate, trust streams, replicas, a graceful stop."""

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
from prometheus_client import CollectorRegistry

from csi_driver._proto import authority_pb2
from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.keyring import encode_keyring, make_keyring
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.errors import CertmountError
from csi_driver.core.spec import DEFAULT_ISSUER
from tests.integration.authority.world import SERVING_NAME, Caller, World
from tests.support.waiting import until


async def shown(world: World) -> x509.Certificate:
    """The certificate that a new handshake gets, verified by another TLS library."""
    context = ssl.create_default_context(cafile=str(world.ca / "authority.crt"))
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", world.server.port, ssl=context, server_hostname=SERVING_NAME)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return x509.load_der_x509_certificate(der)


async def test_the_serving_certificate_is_renewed_without_a_restart(world: World, caller: Caller) -> None:
    """New handshakes get the new one; a connection that is open goes on, stream and all."""
    before = await shown(world)
    assert before.not_valid_after_utc - utc_now() <= timedelta(hours=24)
    stream = caller.watch()
    await stream.read()
    assert await shown(world) == before
    world.server._serving._renew_at = utc_now()
    await world.server._load_ca()
    after = await shown(world)
    assert after.serial_number != before.serial_number
    assert after.public_key() != before.public_key()
    await caller.issue()
    world.server._trust.set_roots(DEFAULT_ISSUER, RootSet((b"x",), 1))
    assert list(_roots(await stream.read())) == [b"x"]


async def test_the_serving_key_is_nowhere_on_disk(world: World) -> None:
    """Whatever the folder holds, it is the CA's."""
    certificate = await shown(world)
    assert {path.name for path in world.ca.iterdir()} == {"ca.json", "root.crt", "authority.crt", ".lock"}
    assert certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DNSName
    ) == [SERVING_NAME]


async def test_a_watcher_hears_of_a_new_root(world: World, caller: Caller) -> None:
    """Now, and when an administrator replaces the CA; new certificates come from it."""
    stream = caller.watch()
    first = parse_certificates(_roots(await stream.read()), "roots")
    other = make_keyring(utc_now())
    store = world.server._surroundings.store
    assert await store.save(encode_keyring(other), await store.load())
    await world.server._load_ca()
    second = parse_certificates(_roots(await stream.read()), "roots")
    assert first != second == (other.root,)
    assert (world.ca / "root.crt").read_bytes() == other.roots_pem
    assert tuple((await caller.issue()).trust[DEFAULT_ISSUER].roots) == other.roots_der


async def test_a_watcher_that_leaves_is_forgotten(world: World, caller: Caller) -> None:
    """Its place is free for the next."""
    stream = caller.watch()
    await stream.read()
    assert world.metric("certmount_authority_trust_watchers") == 1
    stream.cancel()
    await until(lambda: world.metric("certmount_authority_trust_watchers") == 0, "the watcher to be forgotten")


async def test_a_stop_lets_calls_end_and_takes_no_new_ones(world: World) -> None:
    """Not ready first, streams end cleanly, what is under way is answered, and the whole takes no longer than that."""
    async with world.channel() as channel, world.channel() as another:
        caller = Caller(world, channel)
        stream = caller.watch()
        await stream.read()
        world.reviewer.gate.clear()
        under_way = asyncio.create_task(caller.issue())
        await until(lambda: world.metric("certmount_authority_issues_in_flight") == 1, "the call")
        world.stop.set()
        await until(lambda: "stopping" in world.server.unready(), "the stop")
        assert await stream.read() == grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        refusal = await Caller(world, another).refused()
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        world.reviewer.gate.set()
        assert len((await under_way).chain) == 2


async def test_it_is_ready_only_when_it_can_issue(idle_world: World) -> None:
    """While the cluster's keys can't be had it says so, serves no one, and heals by itself."""
    idle_world.cluster.down = True
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(idle_world.server.run(idle_world.stop))
        assert len(idle_world.server.unready()) == 4
        await until(
            lambda: idle_world.metric("certmount_token_proof_failures_total", proof="keys") > 0, "the first attempt"
        )
        assert idle_world.server.unready() == [
            "the keys that the cluster signs tokens with are not known",
            "not serving yet",
        ]
        idle_world.cluster.down = False
        await until(lambda: not idle_world.server.unready(), "the authority")
        idle_world.stop.set()


async def test_it_can_be_stopped_before_it_ever_served(idle_world: World) -> None:
    """A rollout that is called off leaves nothing hanging."""
    idle_world.cluster.down = True
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(idle_world.server.run(idle_world.stop))
        await until(
            lambda: idle_world.metric("certmount_token_proof_failures_total", proof="keys") > 0, "the first attempt"
        )
        idle_world.stop.set()


async def test_an_expired_intermediate_makes_it_unready(world: World) -> None:
    """What it would sign, no one would believe."""
    world.server._ca._clock = lambda: utc_now() + timedelta(days=366)
    assert world.server.unready() == ["there is no internal CA that is known to be current, with a valid intermediate"]


async def test_replicas_that_start_at_once_share_ca_and_trust(idle_world: World) -> None:
    """A pod may renew at another replica than it was issued by."""
    others = [idle_world.replica(CollectorRegistry()) for _ in range(2)]
    async with asyncio.TaskGroup() as tasks:
        for replica in others:
            tasks.create_task(replica.run(idle_world.stop))
        async with idle_world.running():
            await until(lambda: not any(replica.unready() for replica in others), "the other replicas")
            roots = set()
            for port in (idle_world.server.port, *(replica.port for replica in others)):
                async with idle_world.channel(port=port) as channel:
                    answer = await Caller(idle_world, channel).issue()
                    leaf, intermediate = parse_certificates(answer.chain, "chain")
                    leaf.verify_directly_issued_by(intermediate)
                    roots.add(tuple(answer.trust[DEFAULT_ISSUER].roots))
            assert len(roots) == 1


async def test_a_port_in_use_is_said_in_words(idle_world: World) -> None:
    """Also when the other one would let it in: two authorities on one port are a mistake."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        idle_world.server._settings = replace(idle_world.server._settings, listen=address)
        with pytest.raises(ExceptionGroup) as failure:
            await idle_world.server.run(idle_world.stop)
    assert failure.group_contains(OSError, match=f"--listen {address}: cannot be listened on")


async def test_a_policy_that_is_wrong_at_the_start_ends_it(idle_world: World) -> None:
    """Running on without the administrator's rules would be a surprise."""
    idle_world.policy.write_text("policy: 7")
    with pytest.raises(ExceptionGroup) as failure:
        await idle_world.server.run(idle_world.stop)
    assert failure.group_contains(CertmountError, match=r"InvalidPolicy: policy \(line 1\): is not a list")


def _roots(bundle: authority_pb2.TrustBundle) -> Sequence[bytes]:
    return bundle.sets[DEFAULT_ISSUER].roots
