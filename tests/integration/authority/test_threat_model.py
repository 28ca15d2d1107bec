"""The threat model (docs/architecture.md): one test for each attacker, over gRPC."""

from __future__ import annotations

import asyncio
import socket
import ssl
import warnings
from dataclasses import replace

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver.core.certificates.csr import build_csr, names_of
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.secret import Secret
from tests.integration.authority.world import NAME, POD, SERVING_NAME, Caller, World
from tests.support.tokens import DRIVER, TokenIssuer

VICTIM = replace(POD, name="bank-0", namespace="bank", service_account="bank", uid="b", service_account_uid="bb")
ELSEWHERE = replace(VICTIM, node="node-b", node_uid="node-b-uid")


async def test_hostile_pod(world: World, caller: Caller) -> None:
    """It cannot call with its own tokens for any audience. The driver gets only names of the pod's service account for it."""
    for own in (
        world.issuer.pod_token(POD),
        world.issuer.node_token(POD),  # with the node's audience
        world.issuer.pod_token(POD, aud=["https://kubernetes.default.svc"]),
    ):
        world.reviewer.node = POD.reviewed
        assert (await caller.rejected(pod=world.issuer.pod_token(POD), node=own)).reason == "TokenRejected"
    assert (await caller.rejected(metadata=())).reason == "TokenRejected"
    world.reviewer.node = DRIVER.reviewed
    foreign = Names.of([DNSName.parse("bank.bank.svc")], [spiffe_id("cluster.local", "bank", "bank")])
    assert (await caller.rejected(csr=build_csr(world.key, foreign))).reason == "NameNotAllowed"
    leaf = x509.load_der_x509_certificate((await caller.issue()).chain[0])
    assert {name.text for name in names_of(leaf.extensions)} == {NAME, "spiffe://cluster.local/ns/default/sa/hello"}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


async def test_hostile_pod_author(world: World, caller: Caller) -> None:
    for csr, reason in (
        (world.csr("kubernetes.default.svc"), "NameNotAllowed"),
        (build_csr(world.key, Names.of(uris=[spiffe_id("cluster.local", "kube-system", "admin")])), "NameNotAllowed"),
        (world.csr(*(f"{number}.default.svc.cluster.local" for number in range(101))), "InvalidCSR"),
    ):
        assert (await caller.rejected(csr=csr)).reason == reason
        assert world.events.all[-1][:3] == (POD.name, True, reason)


@pytest.mark.parametrize("where", ["on another node", "without any driver"])
async def test_stolen_pod_token(where: str, world: World, caller: Caller) -> None:
    stolen = world.issuer.pod_token(POD)
    if where == "on another node":
        thief = replace(DRIVER, node="node-b", node_uid="node-b-uid")
        world.reviewer.node = thief.reviewed
        failure = await caller.rejected(pod=stolen, node=world.issuer.node_token(thief))
        assert "pod on node node-a, but the driver on node node-b sent it" in failure.text
    else:
        failure = await caller.rejected(pod=stolen, node=stolen)
    assert failure.reason == "TokenRejected"
    assert not world.events.all  # no pod was authenticated


async def test_stolen_node(world: World, caller: Caller) -> None:
    await caller.issue()
    world.reviewer.pod = ELSEWHERE.reviewed
    assert (await caller.rejected(pod=world.issuer.pod_token(ELSEWHERE))).reason == "TokenRejected"
    # A forged token: the attacker has no key of the cluster.
    mallory = TokenIssuer(key_id=world.issuer.key_id)
    assert (await caller.rejected(pod=mallory.pod_token(VICTIM))).reason == "TokenRejected"
    # A deleted pod, whose token is still valid.
    world.reviewer.pod = CertmountError(Reason.TOKEN_REJECTED, "the API server does not accept it")
    assert (await caller.rejected(pod=world.issuer.pod_token(POD, jti="of the deleted"))).reason == "TokenRejected"
    # A deleted pod whose name is in use again.
    world.reviewer.pod = replace(POD.reviewed, pod_uid="its successor")
    assert (await caller.rejected(pod=world.issuer.pod_token(POD, jti="of the former"))).reason == "TokenRejected"


async def test_stolen_node_token(world: World, caller: Caller) -> None:
    node = world.issuer.node_token()
    mallory = TokenIssuer(key_id=world.issuer.key_id)
    for pod in (Secret(""), node, mallory.pod_token(POD), mallory.pod_token(DRIVER)):
        assert (await caller.rejected(pod=pod, node=node)).reason == "TokenRejected"
    assert not world.events.all


def channel_with(world: World, roots: bytes, name: str) -> grpc.aio.Channel:
    options = (("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1))
    credentials = grpc.ssl_channel_credentials(roots)
    return grpc.aio.secure_channel(f"127.0.0.1:{world.server.port}", credentials, options=options)


async def test_network(world: World) -> None:
    own = (world.ca / "authority.crt").read_bytes()
    pods = (world.ca / "root.crt").read_bytes()
    for channel in (
        channel_with(world, pods, SERVING_NAME),
        channel_with(world, own, "another.certmount.svc"),
        grpc.aio.insecure_channel(f"127.0.0.1:{world.server.port}"),
        grpc.aio.secure_channel(f"localhost:{world.server.port}", grpc.ssl_channel_credentials()),
    ):
        async with channel:
            assert (await Caller(world, channel).rejected()).code is grpc.StatusCode.UNAVAILABLE
    assert world.reviewer.calls == 0
    async with channel_with(world, own, SERVING_NAME) as channel:
        await Caller(world, channel).issue()
    with pytest.raises(ssl.SSLError):
        await asyncio.to_thread(handshake, world, own, ssl.TLSVersion.TLSv1_1)


def handshake(world: World, roots: bytes, newest: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cadata=roots.decode())
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the test needs an old version
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
    with socket.create_connection(("127.0.0.1", world.server.port), timeout=5) as plain:
        context.wrap_socket(plain, server_hostname=SERVING_NAME).close()
