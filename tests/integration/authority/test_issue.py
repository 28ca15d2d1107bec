"""Issue and Report calls over gRPC, and the limits beyond which other callers are still served."""

from __future__ import annotations

import asyncio
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from structlog.testing import capture_logs

from csi_driver._proto import authority_pb2
from csi_driver.authority import retry
from csi_driver.authority.authn.limits import MAX_ISSUES_PER_NODE, MAX_STREAMS_PER_NODE, POD_RATE
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.certificates.verification import ExpectedCertificate, VerifiedCertificate, verify_certificate
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import MAX_TOKEN_BYTES
from csi_driver.core.names import URI, DNSName, Names, spiffe_id
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from tests.integration.authority.world import NAME, POD, Caller, World, failure_of
from tests.support.tokens import Pod
from tests.support.waiting import until

ID = spiffe_id("cluster.local", "default", "hello")


def verified(answer: authority_pb2.IssueResponse, world: World, names: Names) -> VerifiedCertificate:
    expected = ExpectedCertificate(world.key.public_key(), names, "default", "hello")
    return verify_certificate(answer.chain, answer.trust[DEFAULT_ISSUER].roots, expected, datetime.now(UTC))


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.ED25519])
async def test_certificate_passes_the_nodes_verification(key_type: KeyType, world: World, caller: Caller) -> None:
    world.key = generate_key(key_type)
    names = Names.of([DNSName.parse(NAME)], [URI.parse("spiffe://cluster.local/extra/a")])
    answer = await caller.issue(csr=build_csr(world.key, names), duration=timedelta(minutes=5))
    bundle = verified(answer, world, names)
    lifetime = bundle.leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(minutes=4, seconds=50) < lifetime <= timedelta(minutes=5)
    assert not answer.HasField("renew_after")
    assert encode_certificates(bundle.roots) == (world.ca / "root.crt").read_bytes()


async def test_request_without_names_gets_the_spiffe_id_for_a_day(caller: Caller, world: World) -> None:
    bundle = verified(await caller.issue(csr=world.csr()), world, Names())
    lifetime = bundle.leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(hours=23, minutes=59) < lifetime <= timedelta(hours=24)


@pytest.mark.peers("openssl")
async def test_openssl_verifies_the_certificate(caller: Caller, world: World) -> None:
    bundle = verified(await caller.issue(), world, Names.of([DNSName.parse(NAME)]))
    (world.folder / "chain.pem").write_bytes(encode_certificates(bundle.chain))
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca/root.crt", "-untrusted", "chain.pem", "chain.pem"]
    await asyncio.to_thread(subprocess.run, command, cwd=world.folder, check=True)


async def test_error_lists_all_names_that_are_not_allowed(world: World, caller: Caller) -> None:
    names = Names.of([DNSName.parse("bank.example.com"), DNSName.parse(NAME)], [URI.parse("https://mallory.test/")])
    failure = await caller.rejected(csr=build_csr(world.key, names))
    assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NameNotAllowed")
    assert "bank.example.com: no policy rule allows this name for service account default/hello" in failure.text
    assert ("https://mallory.test/" in failure.text, NAME in failure.text) == (True, False)


@pytest.mark.parametrize("seconds", [400 * 86400, 1, 0, -1, 2**62])
async def test_lifetime_outside_the_policy_is_not_allowed(seconds: int, caller: Caller) -> None:
    failure = await caller.rejected(duration=Duration(seconds=seconds))
    possible = 0 <= seconds < 2**62
    assert failure.reason == ("NameNotAllowed" if possible else "InvalidRequest")
    assert ("duration 10s to 24h" if possible else "duration") in failure.text


async def test_policy_change_applies_without_a_restart(caller: Caller, world: World) -> None:
    csr = build_csr(world.key, Names.of([DNSName.parse("www.example.com")]))
    assert (await caller.rejected(csr=csr)).reason == "NameNotAllowed"
    rule = "policy:\n- match: {namespaces: [default], serviceAccounts: [hello]}\n  allow: {dns: [www.example.com]}\n"
    revision = world.server._policy.current.revision
    world.policy.write_text(rule)
    await until(lambda: world.server._policy.current.revision != revision, "the policy")
    assert len((await caller.issue(csr=csr)).chain) == 2


async def test_concurrent_calls_are_limited(world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call beyond the limit fails immediately, so that memory does not grow."""
    world.reviewer.gate.clear()
    monkeypatch.setattr(retry, "CLUSTER_RETRY_S", 0.0)
    calls = [asyncio.create_task(caller.rejected()) for _ in range(512)]
    await until(lambda: world.metric("certmount_authority_issues_in_flight") == 512, "512 calls")
    failure = await caller.rejected()
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "AuthorityOverloaded")
    world.reviewer.pod = CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "unavailable")
    world.reviewer.gate.set()
    # All calls are of one node, which can make only half as many.
    assert {failure.reason for failure in await asyncio.gather(*calls)} <= {"TokenReviewUnavailable", "TooManyRequests"}
    assert world.metric("certmount_authority_issues_in_flight") == 0


async def test_each_request_is_one_entry_of_the_audit_log(world: World, caller: Caller) -> None:
    with capture_logs() as logs:
        await caller.issue()
        await caller.rejected(csr=world.csr("bank.example.com"))
        await caller.rejected(pod=world.issuer.pod_token(Pod(node="node-b")))
    issued, rejected, foreign = (entry for entry in logs if entry["event"] == "certificate")
    expected: dict[str, Any] = {
        "decision": "issued",
        "issuer": "internal",
        "namespace": "default",
        "service_account": "hello",
    }
    expected |= {"pod": POD.name, "pod_uid": POD.uid, "node": "node-a", "requested_names": [NAME]}
    expected |= {"names": [NAME, ID.text], "rules": ("policy[0] (line 3)", "built-in")}
    assert {name: issued[name] for name in expected} == expected
    assert len(issued["serial"]) > 30
    assert len(issued["key_sha256"]) == 64
    steps = [issued[f"{step}_ms"] for step in ("authentication", "policy", "sign")]
    assert 0 < sum(steps) <= issued["duration_ms"] + 0.02
    assert (rejected["decision"], rejected["reason"]) == ("rejected", "NameNotAllowed")
    assert (rejected["requested_names"], rejected.get("sign_ms")) == (["bank.example.com"], None)
    assert (foreign["reason"], foreign["node"], foreign.get("names")) == ("TokenRejected", "node-a", None)


async def test_cancelled_call_has_an_audit_entry_without_a_decision(world: World, caller: Caller) -> None:
    world.reviewer.gate.clear()
    with capture_logs() as logs:
        call = asyncio.create_task(caller.issue())
        await until(lambda: world.reviewer.calls > 0, "the review")
        call.cancel()
        await until(lambda: any(entry["event"] == "certificate" for entry in logs), "the entry")
    assert [entry["decision"] for entry in logs if entry["event"] == "certificate"] == ["none"]
    assert world.metric("certmount_authority_issues_in_flight") == 0


async def test_calls_are_counted_by_reason(world: World, caller: Caller) -> None:
    await caller.issue()
    for _ in range(2):
        await caller.rejected(csr=b"")
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="Ok") == 1
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="InvalidCSR") == 2
    assert world.metric("certmount_authority_call_seconds_count", method="Issue") == 3
    assert world.metric("certmount_issuer_calls_total", issuer="internal", reason="Ok") == 1
    assert world.metric("certmount_issuer_seconds_count", issuer="internal") == 1


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
    await asyncio.gather(*(stream.read() for stream in streams))
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
async def test_unknown_root_set_is_rejected(fields: dict[str, Any], reason: str, world: World, caller: Caller) -> None:
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
        failure = await caller.rejected(metadata=(*caller.bearer(), *metadata))
        assert failure.code in (EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
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
