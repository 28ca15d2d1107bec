"""Limits for callers: beyond them, other callers are still served."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from csi_driver._proto import authority_pb2
from csi_driver.authority.authn.limits import MAX_ISSUES_PER_NODE, MAX_STREAMS_PER_NODE, POD_RATE
from csi_driver.core.identity import MAX_TOKEN_BYTES
from csi_driver.core.secret import Secret
from tests.integration.authority.world import NAME, POD, Caller, World, failure_of
from tests.support.tokens import Pod
from tests.support.waiting import until

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
OTHER_POD = Pod(name="other-0", uid="other")


async def test_pod_that_calls_in_a_loop_is_rate_limited(world: World, caller: Caller) -> None:
    token = world.issuer.pod_token(POD)
    for _ in range(POD_RATE.burst):
        await caller.issue(pod=token)

    async def call_on() -> None:
        for _ in range(50):
            await caller.issue(pod=token)

    failure = await failure_of(call_on())
    assert (failure.code, failure.reason) == (EXHAUSTED, "TooManyRequests")
    assert f"pod default/{POD.name}" in failure.text
    assert "retry after 1 s" in failure.text
    world.reviewer.pod = OTHER_POD.reviewed
    await caller.issue(pod=world.issuer.pod_token(OTHER_POD))


async def test_concurrent_calls_of_a_node_are_limited(world: World, caller: Caller) -> None:
    node = world.issuer.node_token()
    await caller.issue(node=node)  # caches the review of the node token
    world.reviewer.gate.clear()
    calls = [
        asyncio.create_task(caller.issue(pod=world.issuer.pod_token(POD, jti=str(number % 50)), node=node))
        for number in range(MAX_ISSUES_PER_NODE)
    ]
    await until(lambda: world.metric("certmount_authority_issues_in_flight") == MAX_ISSUES_PER_NODE, "the calls")
    failure = await caller.rejected(node=node)
    assert (failure.code, failure.reason) == (EXHAUSTED, "TooManyRequests")
    assert f"has {MAX_ISSUES_PER_NODE} concurrent Issue calls" in failure.text
    world.reviewer.gate.set()
    await asyncio.gather(*calls, return_exceptions=True)
    assert world.metric("certmount_authority_issues_in_flight") == 0


async def test_streams_of_a_node_are_limited(world: World, caller: Caller) -> None:
    streams = [caller.watch() for _ in range(MAX_STREAMS_PER_NODE)]
    for stream in streams:
        await stream.read()
    assert (await failure_of(caller.watch().read())).reason == "TooManyRequests"
    streams[0].cancel()
    await until(lambda: world.metric("certmount_authority_trust_watchers") < MAX_STREAMS_PER_NODE, "the end of one")
    await caller.watch().read()


async def test_client_that_does_not_read_its_stream_delays_no_other_client(world: World) -> None:
    async with world.channel() as slow, world.channel() as quick:
        Caller(world, slow).watch()
        reader = Caller(world, quick)
        stream = reader.watch()
        await stream.read()
        for number in range(200):
            world.server._trust.set_policy(f"revision-{number}" + "x" * 1000)
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while not (await stream.read()).policy_revision.startswith("revision-199"):
                pass
        await reader.issue()


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "unknown usage": ({"usages": [7]}, "usages: has an unknown value"),
    "unspecified usage": ({"usages": [0]}, "usages: has an unknown value"),
    "too many federations": ({"federations": [f"f-{number}" for number in range(5000)]}, "federations: has more than"),
    "repeated federation": ({"federations": ["internal"] * 1000}, "federations: has more than"),
    "long federation": ({"federations": ["x" * 10_000]}, "longer than 253"),
    "empty federation": ({"federations": [""]}, "is empty"),
    "long issuer": ({"issuer": "x" * 10_000}, "longer than 253"),
    "several faults": ({"usages": [7], "issuer": "x" * 10_000}, "(2) issuer, federations: has a name"),
}


@pytest.mark.parametrize("fault", INVALID)
async def test_invalid_request_is_rejected(fault: str, caller: Caller) -> None:
    fields, words = INVALID[fault]
    failure = await caller.rejected(**fields)
    assert (failure.reason, words in failure.text) == ("InvalidRequest", True)
    assert len(failure.text) < 500


@pytest.mark.parametrize(
    "fields,reason",
    [({"issuer": "letsencrypt"}, "IssuerNotFound"), ({"federations": ["partner"]}, "FederationNotFound")],
)
async def test_unknown_issuer_or_federation_is_rejected_with_the_known_names(
    fields: dict[str, Any], reason: str, world: World, caller: Caller
) -> None:
    failure = await caller.rejected(**fields)
    assert (failure.reason, "internal" in failure.text) == (reason, True)
    assert world.events.all[-1][:3] == (POD.name, True, reason)
    assert world.metric("certmount_issuer_calls_total", issuer="internal", reason="Ok") == 0


async def test_fields_of_a_newer_version_are_ignored(world: World, caller: Caller) -> None:
    request = authority_pb2.IssueRequest(csr=world.csr(NAME), pod_token=world.issuer.pod_token(POD).reveal())
    unknown = b"\xa2\x06\x05hello"  # field 100, five bytes
    request.MergeFromString(unknown)
    assert unknown in request.SerializeToString()
    assert len((await caller.send(request)).chain) == 2


async def test_large_metadata_is_rejected_by_the_transport(caller: Caller) -> None:
    for metadata in ((("x-padding", "x" * (2 * MAX_TOKEN_BYTES)),), tuple((f"x-{n}", "y" * 100) for n in range(2000))):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await caller.issue(metadata=(*caller.bearer(), *metadata))
        assert failure.value.code() in (EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
    await caller.issue()


async def test_report_becomes_a_pod_event(world: World, caller: Caller) -> None:
    """A problem is a warning. A line break cannot create a second message."""
    await caller.report(authority_pb2.CONDITION_RENEWAL_FAILING, "NameNotAllowed", "no rule\nallows it")
    await caller.report(authority_pb2.CONDITION_RECOVERED, "", "renewed")
    assert world.events.all == [
        (POD.name, True, "RenewalFailing", "NameNotAllowed: no rule allows it"),
        (POD.name, False, "CertificateRecovered", "renewed"),
    ]


REPORTS: dict[str, tuple[tuple[int, str, str], str]] = {
    "unknown condition": ((99, "NameNotAllowed", ""), "condition: is unknown"),
    "no condition": ((0, "NameNotAllowed", ""), "condition: is unknown"),
    "unknown reason": ((1, "Mallory", ""), "reason: is unknown"),
    "no reason": ((3, "", ""), "reason: is unknown"),
    "long message": ((1, "NameNotAllowed", "x" * 1025), "message: exceeds 1024"),
}


@pytest.mark.parametrize("fault", REPORTS)
async def test_invalid_report_is_rejected_without_an_event(fault: str, world: World, caller: Caller) -> None:
    arguments, words = REPORTS[fault]
    failure = await failure_of(caller.report(*arguments))
    assert (failure.reason, words in failure.text) == ("InvalidRequest", True)
    assert not world.events.all


async def test_report_needs_a_token_of_a_pod_on_the_node(world: World, caller: Caller) -> None:
    world.reviewer.pod = Pod(node="node-b").reviewed
    for token in (Secret("garbage"), world.issuer.pod_token(Pod(node="node-b"))):
        failure = await failure_of(caller.report(authority_pb2.CONDITION_EXPIRED, "NameNotAllowed", "", token))
        assert failure.reason == "TokenRejected"
    assert not world.events.all
