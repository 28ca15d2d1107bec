"""What a caller can make the authority do, hold or say: it has an end, and beyond it others are still served."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from csi_driver._proto import authority_pb2
from csi_driver.authority.authn.limits import MOST_ASKING, MOST_WATCHES, POD_RATE
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import MAX_TOKEN_BYTES
from csi_driver.core.secret import Secret
from tests.integration.authority.world import NAME, POD, Caller, Refusal, World
from tests.support.tokens import Pod
from tests.support.waiting import until

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
NEIGHBOUR = Pod(name="calm-0", uid="calm")


async def test_a_pod_that_asks_in_a_loop_is_slowed_down_and_its_neighbour_is_not(world: World, caller: Caller) -> None:
    """With the reason, and when to come again; the pod's owner reads it on the pod."""
    token = world.issuer.pod_token(POD)
    refusal: Refusal | None = None
    for _ in range(POD_RATE.burst + 50):
        try:
            await caller.issue(pod=token)
        except grpc.aio.AioRpcError as error:
            refusal = Refusal.of(error)
            break
    assert refusal is not None
    assert (refusal.code, refusal.reason) == (EXHAUSTED, "TooManyRequests")
    assert f"pod default/{POD.name}" in refusal.text
    assert "come again in 1 s" in refusal.text
    world.reviewer.pod = NEIGHBOUR.reviewed
    await caller.issue(pod=world.issuer.pod_token(NEIGHBOUR))


async def test_a_node_can_not_take_every_place(world: World, caller: Caller) -> None:
    """While the API server is slow it waits for half of all calls there may be; the next one is refused."""
    node = world.issuer.node_token()
    await caller.issue(node=node)  # so that it is proven
    world.reviewer.gate.clear()
    calls = [
        asyncio.create_task(caller.issue(pod=world.issuer.pod_token(POD, jti=str(number % 50)), node=node))
        for number in range(MOST_ASKING)
    ]
    await until(lambda: world.metric("certmount_authority_issues_in_flight") == MOST_ASKING, "its calls under way")
    refusal = await caller.refused(node=node)
    assert (refusal.code, refusal.reason) == (EXHAUSTED, "TooManyRequests")
    assert f"waits for {MOST_ASKING} certificates already" in refusal.text
    world.reviewer.gate.set()
    await asyncio.gather(*calls, return_exceptions=True)
    assert world.metric("certmount_authority_issues_in_flight") == 0


async def test_a_node_holds_a_few_streams_and_no_more(world: World, caller: Caller) -> None:
    """The next one is refused at once; when one ends its place is free."""
    streams = [caller.watch() for _ in range(MOST_WATCHES)]
    for stream in streams:
        await stream.read()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller.watch().read()
    assert Refusal.of(failure.value).reason == "TooManyRequests"
    streams[0].cancel()
    await until(
        lambda: world.metric("certmount_authority_trust_watchers") < MOST_WATCHES, "the watcher to be forgotten"
    )
    await caller.watch().read()


async def test_a_reader_that_never_reads_holds_up_no_one(world: World) -> None:
    """Its stream fills, and the others hear of each change."""
    async with world.channel() as slow, world.channel() as quick:
        Caller(world, slow).watch()
        reader = Caller(world, quick)
        stream = reader.watch()
        await stream.read()
        for number in range(200):
            world.server._trust.set_policy(f"revision-{number}" + "x" * 1000)
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while not (await stream.read()).policy.startswith("revision-199"):
                pass
        await reader.issue()


FAULTY: dict[str, tuple[dict[str, Any], str]] = {
    "a usage of the future": ({"usages": [7]}, "usages: has one that this authority does not know"),
    "no usage": ({"usages": [0]}, "usages: has one that this authority does not know"),
    "federations without end": (
        {"federations": [f"f-{number}" for number in range(5000)]},
        "federations: has more than",
    ),
    "one federation a thousand times": ({"federations": ["internal"] * 1000}, "federations: has more than"),
    "an endless federation": ({"federations": ["x" * 10_000]}, "longer than 253"),
    "a nameless federation": ({"federations": [""]}, "is empty"),
    "an endless issuer": ({"issuer": "x" * 10_000}, "longer than 253"),
}


@pytest.mark.parametrize("fault", FAULTY)
async def test_what_no_node_driver_sends_is_refused(fault: str, world: World, caller: Caller) -> None:
    """In words, without quoting it at length."""
    fields, words = FAULTY[fault]
    request = authority_pb2.IssueRequest(csr=world.csr(NAME), pod_token=world.issuer.pod_token(POD).reveal(), **fields)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller.send(request)
    refusal = Refusal.of(failure.value)
    assert refusal.reason == "InvalidRequest"
    assert words in refusal.text
    assert len(refusal.text) < 500


async def test_an_issuer_or_federation_that_is_not_there_is_named(world: World, caller: Caller) -> None:
    """With those that are; nothing is signed for it."""
    for field, value, reason in (
        ("issuer", "letsencrypt", "IssuerNotFound"),
        ("federations", ["partner"], "FederationNotFound"),
    ):
        request = authority_pb2.IssueRequest(csr=world.csr(NAME), pod_token=world.issuer.pod_token(POD).reveal())
        if field == "issuer":
            request.issuer = str(value)
        else:
            request.federations.extend(value)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await caller.send(request)
        refusal = Refusal.of(failure.value)
        assert refusal.reason == reason
        assert "internal" in refusal.text
        assert world.heard.events[-1][:3] == (POD.name, True, reason)
    assert world.metric("certmount_issuer_calls_total", issuer="internal", reason="Ok") == 0


async def test_fields_of_a_later_version_are_passed_over(world: World, caller: Caller) -> None:
    """A newer node asks an older authority during an upgrade, and gets what that one can give."""
    request = authority_pb2.IssueRequest(csr=world.csr(NAME), pod_token=world.issuer.pod_token(POD).reveal())
    unknown = b"\xa2\x06\x05hello"  # field 100, five bytes
    request.MergeFromString(unknown)
    assert unknown in request.SerializeToString()
    assert len((await caller.send(request)).chain) == 2


async def test_a_bomb_of_metadata_is_cut_off(caller: Caller) -> None:
    """More than a token with its due is not even read; the next call works."""
    for bomb in ((("x-padding", "x" * (2 * MAX_TOKEN_BYTES)),), tuple((f"x-{n}", "y" * 100) for n in range(2000))):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await caller.issue(metadata=(*caller.bearer(), *bomb))
        assert failure.value.code() in (EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
    await caller.issue()


async def test_a_report_is_said_on_the_pod(world: World, caller: Caller) -> None:
    """What failed and why as a warning, the end of it as good news; a line break can't make a second message of it."""
    await caller.report(authority_pb2.CONDITION_RENEWAL_FAILING, "NameNotAllowed", "no rule\nallows it")
    await caller.report(authority_pb2.CONDITION_RECOVERED, "", "renewed")
    assert world.heard.events == [
        (POD.name, True, "RenewalFailing", "NameNotAllowed: no rule allows it"),
        (POD.name, False, "CertificateRecovered", "renewed"),
    ]


REPORTS: dict[str, tuple[tuple[int, str, str], str]] = {
    "unknown condition": ((99, "NameNotAllowed", ""), "condition: is not known"),
    "no condition": ((0, "NameNotAllowed", ""), "condition: is not known"),
    "made-up reason": ((1, "Mallory", ""), "reason: is none of certmount's reasons"),
    "no reason": ((3, "", ""), "reason: is none of certmount's reasons"),
    "endless message": ((1, "NameNotAllowed", "x" * 1025), "message: is longer than 1024"),
}


@pytest.mark.parametrize("fault", REPORTS)
async def test_a_report_that_no_driver_makes_is_refused(fault: str, world: World, caller: Caller) -> None:
    """Nothing of it is said anywhere."""
    arguments, words = REPORTS[fault]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller.report(*arguments)
    refusal = Refusal.of(failure.value)
    assert refusal.reason == "InvalidRequest"
    assert words in refusal.text
    assert not world.heard.events


async def test_no_one_reports_on_anothers_pod(world: World, caller: Caller) -> None:
    """The pod's token proves which pod it is about, and that the pod is on the node that tells."""
    world.reviewer.pod = Pod(node="node-b").reviewed
    for token in (Secret("garbage"), world.issuer.pod_token(Pod(node="node-b"))):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await caller.report(authority_pb2.CONDITION_EXPIRED, "NameNotAllowed", "", token)
        assert Refusal.of(failure.value).reason == "TokenRejected"
    assert not world.heard.events


async def test_an_api_server_that_is_away_for_a_moment_makes_calls_wait(
    world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in flight is answered when it is back; nothing is issued before."""
    monkeypatch.setattr("csi_driver.authority.authn.token_reviews._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("csi_driver.authority.authn.token_reviews._PAUSE_CAP_S", 0.05)
    world.reviewer.pod = CertmountError(
        Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview: the API server cannot be reached"
    )
    calls = [
        asyncio.create_task(caller.issue(pod=world.issuer.pod_token(POD, jti=str(number)))) for number in range(20)
    ]
    await until(lambda: world.reviewer.asked > 60, "each to be asked about again")
    assert not any(call.done() for call in calls)
    assert world.metric("certmount_issuer_calls_total", issuer="internal", reason="Ok") == 0
    world.reviewer.pod = POD.reviewed
    assert all(len(answer.chain) == 2 for answer in await asyncio.gather(*calls))
