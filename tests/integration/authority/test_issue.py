"""Certificates over the real wire."""

from __future__ import annotations

import asyncio
import subprocess
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from structlog.testing import capture_logs

from csi_driver._proto import authority_pb2
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.certificates.verification import ExpectedCertificate, verify_certificate
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import URI, DNSName, Names, spiffe_id
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from tests.integration.authority.world import NAME, POD, Caller, Refusal, World
from tests.support.tokens import Pod
from tests.support.waiting import until

ID = spiffe_id("cluster.local", "default", "hello")


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.ED25519])
async def test_what_is_issued_passes_the_nodes_judgement(key_type: KeyType, world: World, caller: Caller) -> None:
    """Key, names, validity and chain are what the node asked for; the SPIFFE ID comes with it, unasked."""
    key = generate_key(key_type)
    names = Names.of([DNSName.parse(NAME)], [URI.parse("spiffe://cluster.local/extra/a")])
    answer = await caller.issue(csr=build_csr(key, names), duration=timedelta(minutes=5))
    expected = ExpectedCertificate(key.public_key(), names, "default", "hello")
    bundle = verify_certificate(answer.chain, answer.trust[DEFAULT_ISSUER].roots, expected, datetime.now(UTC))
    life = bundle.leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(minutes=4, seconds=50) < life <= timedelta(minutes=5)
    assert not answer.HasField("renew_after")
    assert encode_certificates(bundle.roots) == (world.ca / "root.crt").read_bytes()


async def test_a_pod_that_asks_for_nothing_gets_its_spiffe_id(caller: Caller, world: World) -> None:
    """For a day, by default."""
    answer = await caller.issue(csr=world.csr())
    bundle = verify_certificate(
        answer.chain,
        answer.trust[DEFAULT_ISSUER].roots,
        ExpectedCertificate(world.key.public_key(), Names(), "default", "hello"),
        datetime.now(UTC),
    )
    life = bundle.leaf.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(hours=23, minutes=59) < life <= timedelta(hours=24)


@pytest.mark.peers("openssl")
async def test_openssl_agrees(caller: Caller, world: World) -> None:
    """Another program verifies what came over the wire."""
    answer = await caller.issue()
    bundle = verify_certificate(
        answer.chain,
        answer.trust[DEFAULT_ISSUER].roots,
        ExpectedCertificate(world.key.public_key(), Names.of([DNSName.parse(NAME)]), "default", "hello"),
        datetime.now(UTC),
    )
    (world.folder / "chain.pem").write_bytes(encode_certificates(bundle.chain))
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca/root.crt", "-untrusted", "chain.pem", "chain.pem"]
    result = await asyncio.to_thread(
        subprocess.run, command, cwd=world.folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


async def test_a_name_that_no_rule_allows_is_refused_by_name(caller: Caller) -> None:
    """All refused names at once, with the account and what to do."""
    names = Names.of([DNSName.parse("bank.example.com"), DNSName.parse(NAME)], [URI.parse("https://mallory.test/")])
    refusal = await caller.refused(csr=build_csr(generate_key(KeyType.EC_P256), names))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NameNotAllowed")
    assert "bank.example.com: no policy rule allows this name for service account default/hello" in refusal.text
    assert "https://mallory.test/" in refusal.text
    assert NAME not in refusal.text


async def test_another_pods_spiffe_id_is_refused(caller: Caller) -> None:
    """It can be asked for like any name, and is granted by a rule only."""
    names = Names.of(uris=[spiffe_id("cluster.local", "kube-system", "admin")])
    refusal = await caller.refused(csr=build_csr(generate_key(KeyType.EC_P256), names))
    assert refusal.reason == "NameNotAllowed"


@pytest.mark.parametrize(
    "duration,reason",
    [
        (timedelta(days=400), "NameNotAllowed"),
        (timedelta(seconds=1), "NameNotAllowed"),
        (timedelta(0), "NameNotAllowed"),
        (timedelta(seconds=-1), "InvalidRequest"),
    ],
)
async def test_a_life_that_policy_does_not_allow_is_refused(duration: timedelta, reason: str, caller: Caller) -> None:
    """Too long, too short, or none at all: never silently something else."""
    refusal = await caller.refused(duration=duration)
    assert refusal.reason == reason
    assert ("duration 10s to 24h" if reason == "NameNotAllowed" else "duration") in refusal.text


async def test_a_duration_beyond_all_calendars_is_refused(caller: Caller, world: World) -> None:
    """No arithmetic breaks on it."""
    request = authority_pb2.IssueRequest(csr=world.csr(), pod_token=world.issuer.pod_token(POD).reveal())
    request.duration.seconds = 2**62
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller.send(request)
    assert Refusal.of(failure.value).reason == "InvalidRequest"


async def test_a_fixed_policy_works_without_a_restart(caller: Caller, world: World) -> None:
    """What was refused is issued some seconds after the administrator's change."""
    csr = build_csr(world.key, Names.of([DNSName.parse("www.example.com")]))
    assert (await caller.refused(csr=csr)).reason == "NameNotAllowed"
    rule = "policy:\n- match: {namespaces: [default], serviceAccounts: [hello]}\n  allow: {dns: [www.example.com]}\n"
    world.policy.write_text(rule)
    async with asyncio.timeout(20):
        while (answer := await _try(caller, csr)) is None:  # noqa: ASYNC110  # the authority tells no one that it has read a file
            await asyncio.sleep(0.1)
    assert len(answer.chain) == 2


async def _try(caller: Caller, csr: bytes) -> authority_pb2.IssueResponse | None:
    try:
        return await caller.issue(csr=csr)
    except grpc.aio.AioRpcError:
        return None


async def test_too_many_at_once_are_told_to_come_later(
    world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bounded queue: the rest gets an answer at once, and memory does not grow."""
    world.reviewer.gate.clear()
    monkeypatch.setattr("csi_driver.authority.authn.token_reviews._PATIENCE_S", 0.0)
    calls = [asyncio.create_task(caller.refused()) for _ in range(512)]
    await until(lambda: world.metric("certmount_authority_issues_in_flight") == 512, "512 calls under way")
    refusal = await caller.refused()
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "AuthorityOverloaded")
    world.reviewer.pod = CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "down")
    world.reviewer.gate.set()
    # All are of one node, which may wait for half as many.
    assert {refusal.reason for refusal in await asyncio.gather(*calls)} <= {"TokenReviewUnavailable", "TooManyRequests"}
    assert world.metric("certmount_authority_issues_in_flight") == 0


async def test_each_decision_is_one_line_of_the_audit_log(world: World, caller: Caller) -> None:
    """Who, on which node, which names, which serial and key, or why not."""
    with capture_logs() as logs:
        await caller.issue()
        await caller.refused(csr=world.csr("bank.example.com"))
        await caller.refused(pod=world.issuer.pod_token(Pod(node="node-b")))
    issued, refused, foreign = (entry for entry in logs if entry["event"] == "certificate")
    assert issued["decision"] == "issued"
    assert (
        issued.items()
        >= {
            "namespace": "default",
            "service_account": "hello",
            "pod": POD.name,
            "pod_uid": POD.uid,
            "node": "node-a",
            "names": [NAME, ID.text],
        }.items()
    )
    assert len(issued["serial"]) > 30
    assert len(issued["key_sha256"]) == 64
    assert (issued["issuer"], issued["asked"], issued["rules"]) == (
        "internal",
        [NAME],
        ("policy[0] (line 3)", "built-in"),
    )
    steps = [issued[f"{step}_ms"] for step in ("proof", "policy", "sign")]
    assert 0 < sum(steps) <= issued["duration_ms"] + 0.02
    assert (refused["decision"], refused["reason"]) == ("refused", "NameNotAllowed")
    assert refused["asked"] == ["bank.example.com"]
    assert "sign_ms" not in refused
    assert (foreign["reason"], foreign["node"]) == ("TokenRejected", "node-a")
    assert "names" not in foreign


async def test_a_caller_that_goes_away_leaves_a_line_too(world: World, caller: Caller) -> None:
    """With what was known by then, and no decision."""
    world.reviewer.gate.clear()
    with capture_logs() as logs:
        call = asyncio.create_task(caller.issue())
        await until(lambda: world.reviewer.asked > 0, "the proof to be under way")
        call.cancel()
        await until(lambda: any(entry["event"] == "certificate" for entry in logs), "the line")
    assert [entry["decision"] for entry in logs if entry["event"] == "certificate"] == ["none"]
    assert world.metric("certmount_authority_issues_in_flight") == 0


async def test_calls_are_counted_by_reason(world: World, caller: Caller) -> None:
    """Success and each kind of failure, as the events name them."""
    await caller.issue()
    await caller.refused(csr=b"")
    await caller.refused(csr=b"")
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="Ok") == 1
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="InvalidCSR") == 2
    assert world.metric("certmount_authority_call_seconds_count", method="Issue") == 3
    assert world.metric("certmount_issuer_calls_total", issuer="internal", reason="Ok") == 1
    assert world.metric("certmount_issuer_seconds_count", issuer="internal") == 1
