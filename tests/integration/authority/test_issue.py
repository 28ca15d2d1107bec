"""Issue, Check and Report calls over gRPC, and the limits beyond which other callers are still served."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from structlog.testing import capture_logs

from csi_driver._proto import authority_pb2
from csi_driver.authority import retry
from csi_driver.authority.authn.limits import MAX_CALLERS, MAX_STREAMS_PER_NODE, POD_RATE
from csi_driver.core.certificates.csr import build_csr, names_of
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.certificates.verification import ExpectedCertificate, VerifiedCertificate, verify_certificate
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import MAX_TOKEN_BYTES
from csi_driver.core.names import URI, DNSName, Names, spiffe_id
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from csi_driver.core.subject import Subject
from tests.integration.authority.world import NAME, POD, Caller, World, failure_of
from tests.support.tokens import Pod
from tests.support.waiting import until

ID = spiffe_id("cluster.local", "default", "hello")


@pytest.fixture(params=["unary", "stream"])
def calls(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def verified(answer: authority_pb2.IssueResponse, world: World, names: Names) -> VerifiedCertificate:
    expected = ExpectedCertificate(world.key.public_key(), names, "default", "hello")
    return verify_certificate(answer.chain, answer.trust[DEFAULT_ISSUER].roots, expected, datetime.now(UTC))


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.ED25519])
async def test_certificate_passes_the_nodes_verification(key_type: KeyType, world: World, caller: Caller) -> None:
    world.key = generate_key(key_type)
    names = Names.of([DNSName.parse(NAME)], [ID])
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


async def test_certificate_has_the_subject_that_the_policy_allows(caller: Caller, world: World) -> None:
    names = Names.of([DNSName.parse(NAME)])
    answer = await caller.issue(subject=f"CN={NAME},O=Example")
    chain, roots = answer.chain, answer.trust[DEFAULT_ISSUER].roots
    for text, accepted in ((f"CN={NAME},O=Example", True), (f"CN={NAME}", False), ("O=Example", False)):
        expected = ExpectedCertificate(world.key.public_key(), names, "default", "hello", subject=Subject.parse(text))
        if accepted:
            verify_certificate(chain, roots, expected, datetime.now(UTC))
        else:
            with pytest.raises(CertmountError, match=f"the subject is 'CN={NAME},O=Example', not '{text}'"):
                verify_certificate(chain, roots, expected, datetime.now(UTC))


@pytest.mark.parametrize(
    "subject, reason, text",
    [
        (
            "O=Other",
            "NameNotAllowed",
            "volumeAttributes.subject: O=Other is not a subject that policy[0] (line 3) allows",
        ),
        ("CN=admin", "NameNotAllowed", "volumeAttributes.subject: CN=admin is not a subject"),
        ("O=system:masters", "InvalidRequest", "subject: has the attribute O with the prefix system:"),
        ("OU=" + "a" * 65536, "InvalidRequest", "subject: is 65539 bytes long; a subject has at most 1024"),
    ],
)
async def test_other_subjects_are_rejected(subject: str, reason: str, text: str, caller: Caller) -> None:
    failure = await caller.rejected(subject=subject)
    assert failure.reason == reason
    assert text in failure.text


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
    assert "duration: " in failure.text
    assert ("that policy[0] (line 3) allows for" in failure.text) is possible


async def test_other_uri_replaces_the_spiffe_id(caller: Caller, world: World) -> None:
    names = Names.of([DNSName.parse(NAME)], [URI.parse("spiffe://cluster.local/extra/a")])
    csr = build_csr(world.key, names)
    failure = await caller.rejected(csr=csr)
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidAttributes")
    words = f"volumeAttributes.uri-sans: spiffe://cluster.local/extra/a cannot be used with the pod's SPIFFE ID {ID}"
    assert words in failure.text
    answer = await caller.issue(csr=csr, without_spiffe_id=True)
    expected = ExpectedCertificate(world.key.public_key(), names, "default", "hello", spiffe=False)
    roots = answer.trust[DEFAULT_ISSUER].roots
    assert names_of(verify_certificate(answer.chain, roots, expected, datetime.now(UTC)).leaf.extensions) == names


async def test_policy_change_applies_without_a_restart(caller: Caller, world: World) -> None:
    csr = build_csr(world.key, Names.of([DNSName.parse("www.example.com")]))
    assert (await caller.rejected(csr=csr)).reason == "NameNotAllowed"
    rule = "policy:\n- match: {namespaces: [default], serviceAccounts: [hello]}\n  allow: {dns: [www.example.com]}\n"
    revision = world.server._policy.current.revision
    world.policy.write_text(rule)
    await until(lambda: world.server._policy.current.revision != revision, "the policy")
    assert len((await caller.issue(csr=csr)).chain) == 2


async def test_concurrent_calls_are_limited(world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call beyond the share of its address fails immediately, so that memory does not grow."""
    node = world.issuer.node_token()
    await caller.issue(node=node)
    world.reviewer.gate.clear()
    monkeypatch.setattr(retry, "CLUSTER_RETRY_S", 0.0)
    token = world.issuer.pod_token(POD, jti="not reviewed yet")
    calls = [asyncio.create_task(caller.rejected(pod=token, node=node)) for _ in range(MAX_CALLERS // 2)]
    await until(lambda: world.metric("certmount_authority_issues_in_flight") == MAX_CALLERS // 2, "the calls")
    async with world.channel() as another:  # one connection cannot have more calls in progress
        failure = await Caller(world, another).rejected()
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ShareExceeded")
    assert "address 127.0.0.1: holds 256 of 512 Issue calls that are not authenticated yet" in failure.text
    world.reviewer.pod = CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "unavailable")
    world.reviewer.gate.set()
    assert {failure.reason for failure in await asyncio.gather(*calls)} <= {"TokenReviewUnavailable", "ShareExceeded"}
    assert world.metric("certmount_authority_issues_in_flight") == 0


async def test_each_request_is_one_entry_of_the_audit_log(world: World, caller: Caller) -> None:
    with capture_logs() as logs:
        await caller.issue()
        await caller.rejected(csr=world.csr("bank.example.com"))
        await caller.rejected(pod=world.issuer.pod_token(Pod(node="node-b")))
    issued, rejected, foreign = (entry for entry in logs if entry["event"] == "certificate")
    expected: dict[str, Any] = {"decision": "issued", "issuer": "internal"}
    expected |= {"namespace": "default", "service_account": "hello"}
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
    node = world.issuer.node_token()
    await caller.issue(node=node)
    world.reviewer.gate.clear()
    before = world.reviewer.calls
    with capture_logs() as logs:
        call = asyncio.create_task(caller.issue(pod=world.issuer.pod_token(POD, jti="new"), node=node))
        await until(lambda: world.reviewer.calls > before, "the review")
        call.cancel()
        await until(lambda: any(entry["event"] == "certificate" for entry in logs), "the entry")
    assert [entry["decision"] for entry in logs if entry["event"] == "certificate"] == ["none"]
    assert world.metric("certmount_authority_issues_in_flight") == 0


async def test_authority_without_an_issuers_file_has_valid_issuers(world: World) -> None:
    """An alert refers to the metric."""
    assert world.metric("certmount_issuers_valid") == 1


async def test_calls_are_counted_by_reason(world: World, caller: Caller) -> None:
    await caller.issue()
    for _ in range(2):
        await caller.rejected(csr=b"")
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="Ok") == 1
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="InvalidCSR") == 2
    assert world.metric("certmount_authority_call_duration_seconds_count", method="Issue") == 3
    assert world.metric("certmount_issuer_calls_total", issuer="internal", reason="Ok") == 1
    assert world.metric("certmount_issuer_call_duration_seconds_count", issuer="internal") == 1


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


async def test_streams_of_a_node_are_limited(world: World, caller: Caller) -> None:
    streams = [caller.watch() for _ in range(MAX_STREAMS_PER_NODE)]
    await asyncio.gather(*(stream.read() for stream in streams))
    assert (await failure_of(caller.watch().read())).reason == "ShareExceeded"
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


async def test_callers_cannot_create_metrics_series(world: World, caller: Caller) -> None:
    """Each series takes memory forever, and the monitoring system stores it."""

    def series() -> int:
        return sum(len(metric.samples) for metric in world.registry.collect())

    await caller.rejected(issuer="missing", federations=["missing"])
    await caller.report(authority_pb2.CONDITION_RENEWAL_FAILING, "NameNotAllowed", "x")
    before = series()
    for number in range(3):
        await caller.rejected(issuer=f"missing-{number}", federations=[f"missing-{number}"])
        await caller.report(authority_pb2.CONDITION_RENEWAL_FAILING, "NameNotAllowed", f"x-{number}")
        async with world.channel() as channel:
            method = f"/certmount.v1.Authority/Missing{number}"
            missing: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            with pytest.raises(grpc.RpcError, match="Method not found"):
                await missing(b"")
    assert series() == before


async def test_fields_of_a_newer_version_are_ignored(world: World, caller: Caller) -> None:
    request = authority_pb2.IssueRequest(csr=world.csr(NAME), pod_token=world.issuer.pod_token(POD).reveal())
    unknown = b"\xa2\x06\x05hello"  # field 100, five bytes
    request.MergeFromString(unknown)
    assert unknown in request.SerializeToString()
    assert len((await caller.send(request)).chain) == 2


async def test_large_messages_and_metadata_are_rejected_by_the_transport(caller: Caller) -> None:
    request = authority_pb2.IssueRequest(csr=b"0" * 200_000, pod_token="x")
    assert (await failure_of(caller.send(request))).code is EXHAUSTED
    for metadata in ((("x-padding", "x" * (2 * MAX_TOKEN_BYTES)),), tuple((f"x-{n}", "y" * 100) for n in range(2000))):
        failure = await caller.rejected(metadata=(*caller.bearer(), *metadata))
        assert failure.code in (EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
    await caller.issue()


async def test_report_becomes_a_pod_event(world: World, caller: Caller) -> None:
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


_POLICY = """
policy:
- match: {namespaces: [default], serviceAccounts: [hello]}
  allow: {dns: ["{pod}.example.com"], key_types: [EC-P256, RSA-4096]}
"""


async def _check(world: World, caller: Caller, pod: Pod, key_type: str = "RSA-4096") -> None:
    token = world.issuer.pod_token(pod).reveal()
    request = authority_pb2.IssueRequest(csr=world.csr("hello-0.example.com"), pod_token=token)
    check = authority_pb2.CheckRequest(request=request, key_type=key_type)
    await caller._stub.Check(check, metadata=caller.bearer(), timeout=30)


async def test_check_returns_what_issue_would_and_signs_nothing(idle_world: World) -> None:
    """The policy allows a pod only the name of the pod itself, and two key types. The CSR has a P-256 key."""
    world = idle_world
    world.policy.write_text(_POLICY)
    other = replace(POD, name="hello-1", uid="11111111-1111-4111-8111-111111111112")
    with capture_logs() as logs:
        async with world.running(), world.channel() as channel:
            caller = Caller(world, channel)
            await _check(world, caller, POD)
            not_allowed = await failure_of(_check(world, caller, POD, "RSA-2048"))
            assert (not_allowed.code, not_allowed.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NameNotAllowed")
            unknown = await failure_of(_check(world, caller, POD, "DSA"))
            assert unknown.text.startswith("InvalidRequest: key_type: is not a key type;")
            world.reviewer.pod = other.reviewed
            refused = await failure_of(_check(world, caller, other))
            issue = caller.rejected(csr=world.csr("hello-0.example.com"), pod=world.issuer.pod_token(other))
            assert (refused.reason, refused) == ("NameNotAllowed", await issue)
            assert ("hello-1", True) in [(name, warning) for name, warning, *_ in world.events.all]
    decisions = [line["decision"] for line in logs if line["event"] == "certificate"]
    assert decisions == ["rejected"] * 3
