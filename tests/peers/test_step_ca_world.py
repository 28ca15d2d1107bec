"""Certificates from a real step-ca through a real authority."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from structlog.testing import capture_logs

from csi_driver._proto import authority_pb2
from csi_driver.core.certificates.verification import ExpectedCertificate, verify_certificate
from csi_driver.core.names import DNSName, Names
from tests.integration.authority.world import NAME, POD, SERVING_NAME, Caller, Cluster, World, failure_of
from tests.peers.step_ca import PROVISIONER, RealStepCA
from tests.peers.test_acme_node import running_node
from tests.support.kubelet import FakePod
from tests.support.tokens import TokenIssuer
from tests.support.waiting import until

pytestmark = pytest.mark.peers("step-ca")

POLICY = """
policy:
- match: {namespaces: [default], serviceAccounts: [hello]}
  allow: {dns: ["*.{namespace}.svc.{cluster_domain}"], issuers: [internal, step], max_duration: 48h}
"""


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[RealStepCA]:
    async with RealStepCA(tmp_path / "step") as running:
        yield running


@pytest.fixture
async def world(tmp_path: Path, ca: RealStepCA) -> AsyncIterator[World]:
    file, key = tmp_path / "issuers.yaml", {"file": str(ca.key_file)}
    declared = {"url": ca.url, "root_sha256": ca.root_sha256, "provisioner": PROVISIONER, "key": key}
    file.write_text(yaml.safe_dump({"issuers": [{"name": "step", "step_ca": declared}]}))
    issuer = TokenIssuer()
    world = World(tmp_path, issuer, Cluster(issuer), issuers=file, serving_names=(SERVING_NAME, "localhost"))
    world.policy.write_text(POLICY)
    async with world.running():
        yield world


@pytest.fixture
async def caller(world: World) -> AsyncIterator[Caller]:
    async with world.channel() as channel:
        yield Caller(world, channel)


def request(world: World, **changes: Any) -> authority_pb2.IssueRequest:
    defaults = {"csr": world.csr(NAME), "pod_token": world.issuer.pod_token(POD).reveal(), "issuer": "step"}
    return authority_pb2.IssueRequest(**{**defaults, **changes})


async def known_roots(caller: Caller) -> Any:
    call = caller.watch()
    try:
        while "step" not in (bundle := await call.read()).sets:
            pass
        return bundle
    finally:
        call.cancel()


async def test_certificate_of_step_ca_passes_the_nodes_checks(world: World, caller: Caller, ca: RealStepCA) -> None:
    bundle = await known_roots(caller)
    assert list(bundle.sets["step"].roots) == [ca.root_der]
    with capture_logs() as logs:
        answer = await caller.send(request(world))
    assert set(answer.trust) == {"step"}
    expected = ExpectedCertificate(world.key.public_key(), Names.of([DNSName.parse(NAME)]), "default", "hello")
    checked = verify_certificate(answer.chain, answer.trust["step"].roots, expected, datetime.now(UTC))
    assert checked.roots == (ca.root,)
    audit = next(entry for entry in logs if entry["event"] == "certificate")
    assert (audit["decision"], audit["issuer"]) == ("issued", "step")
    assert audit["sign_ms"] > 0
    assert world.metric("certmount_issuer_calls_total", issuer="step", reason="Ok") == 1


async def test_pod_of_the_internal_ca_can_federate_with_step_ca(world: World, caller: Caller, ca: RealStepCA) -> None:
    """For migrations: pods of both issuers trust each other."""
    await known_roots(caller)
    answer = await caller.send(request(world, issuer="internal", federations=["step"]))
    assert set(answer.trust) == {"internal", "step"}
    assert list(answer.trust["step"].roots) == [ca.root_der]


async def test_error_of_step_ca_reaches_the_pod(world: World, caller: Caller) -> None:
    """The policy allows 30 hours, step-ca does not."""
    await known_roots(caller)
    wire_request = request(world)
    wire_request.duration.FromTimedelta(timedelta(hours=30))
    failure = await failure_of(caller.send(wire_request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NameNotAllowed")
    text = "issuer step: step-ca rejected the request: requested duration of 30h1m0s is more than the authorized"
    assert text in failure.text


async def test_outage_of_step_ca_is_retryable_and_affects_only_it(world: World, caller: Caller, ca: RealStepCA) -> None:
    await known_roots(caller)
    await ca.stop()
    failure = await failure_of(caller.send(request(world)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "IssuerUnavailable")
    assert "cannot connect: Connection refused" in failure.text
    assert (await caller.issue()).chain
    await ca.start()
    assert (await caller.send(request(world))).chain


async def test_volume_gets_a_federated_root_without_a_new_certificate(
    world: World, caller: Caller, ca: RealStepCA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi_driver.authority.issuers.external_issuer.DIAGNOSE_S", 0.2)
    await known_roots(caller)
    other = RealStepCA(tmp_path / "other", name="Other")
    async with running_node(world) as node:
        pod = FakePod(POD.namespace, POD.name, POD.service_account, POD.uid)
        request = node.request(pod, {"issuer": "step", "name": NAME})
        await node.publish(request)
        before = node.shown(request)
        assert before.roots == (ca.root,)
        assert NAME in before.names
        ca.federated = [other.root_file]
        await ca.restart()
        await until(lambda: len(node.shown(request).roots) == 2, "the second root", timeout_s=60)
        after = node.shown(request)
        assert set(after.roots) == {ca.root, other.root}
        assert (after.key, after.serial) == (before.key, before.serial)
        await node.unpublish(request)
