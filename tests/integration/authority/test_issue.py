"""Issue calls over gRPC."""

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
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.certificates.verification import ExpectedCertificate, VerifiedCertificate, verify_certificate
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import URI, DNSName, Names, spiffe_id
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from tests.integration.authority.world import NAME, POD, Caller, World
from tests.support.tokens import Pod
from tests.support.waiting import until

ID = spiffe_id("cluster.local", "default", "hello")


def verified(answer: authority_pb2.IssueResponse, world: World, names: Names) -> VerifiedCertificate:
    expected = ExpectedCertificate(world.key.public_key(), names, "default", "hello")
    return verify_certificate(answer.chain, answer.trust[DEFAULT_ISSUER].roots, expected, datetime.now(UTC))


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.ED25519])
async def test_certificate_passes_the_nodes_verification(key_type: KeyType, world: World, caller: Caller) -> None:
    key = generate_key(key_type)
    names = Names.of([DNSName.parse(NAME)], [URI.parse("spiffe://cluster.local/extra/a")])
    answer = await caller.issue(csr=build_csr(key, names), duration=timedelta(minutes=5))
    expected = ExpectedCertificate(key.public_key(), names, "default", "hello")
    bundle = verify_certificate(answer.chain, answer.trust[DEFAULT_ISSUER].roots, expected, datetime.now(UTC))
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


async def test_error_lists_all_names_that_are_not_allowed(caller: Caller) -> None:
    names = Names.of([DNSName.parse("bank.example.com"), DNSName.parse(NAME)], [URI.parse("https://mallory.test/")])
    failure = await caller.rejected(csr=build_csr(generate_key(KeyType.EC_P256), names))
    assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NameNotAllowed")
    assert "bank.example.com: no policy rule allows this name for service account default/hello" in failure.text
    assert "https://mallory.test/" in failure.text
    assert NAME not in failure.text


@pytest.mark.parametrize(
    "duration,reason",
    [
        (timedelta(days=400), "NameNotAllowed"),
        (timedelta(seconds=1), "NameNotAllowed"),
        (timedelta(0), "NameNotAllowed"),
        (timedelta(seconds=-1), "InvalidRequest"),
    ],
)
async def test_lifetime_outside_the_policy_is_not_allowed(duration: timedelta, reason: str, caller: Caller) -> None:
    failure = await caller.rejected(duration=duration)
    assert failure.reason == reason
    assert ("duration 10s to 24h" if reason == "NameNotAllowed" else "duration") in failure.text


async def test_duration_out_of_range_is_rejected(caller: Caller) -> None:
    assert (await caller.rejected(duration=Duration(seconds=2**62))).reason == "InvalidRequest"


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
    await caller.rejected(csr=b"")
    await caller.rejected(csr=b"")
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="Ok") == 1
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="InvalidCSR") == 2
    assert world.metric("certmount_authority_call_seconds_count", method="Issue") == 3
    assert world.metric("certmount_issuer_calls_total", issuer="internal", reason="Ok") == 1
    assert world.metric("certmount_issuer_seconds_count", issuer="internal") == 1
