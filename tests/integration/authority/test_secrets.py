"""Certificates for Secrets over gRPC: who can request them, what the policy allows, and the shares of a flood."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509 import load_der_x509_certificate as leaf_of
from structlog.testing import capture_logs

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.authn.limits import SECRET_RATE
from csi_driver.core.certificates.csr import build_csr, names_of
from csi_driver.core.names import URI, DNSName, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from tests.integration.authority.world import SHOP, Controller, World, failure_of, secrets_world
from tests.support.tokens import CONTROLLER, DRIVER, Pod, TokenIssuer

POLICY = """
policy:
- match: {namespaces: [shop], secrets: [shop-tls, "edge-*"]}
  allow: {dns: [shop.example.com, "*.shop.example.com"], usages: [server], max_duration: 72h}
- match: {namespaces: [bank], secrets: ["*"]}
  allow: {dns: ["*.{namespace}.example.com"], emails: ["ops@bank.example.com"], uris: ["https://bank.example.com/*"]}
- match: {namespaces: ["*"], serviceAccounts: ["*"]}
  allow: {dns: [pods.example.com]}
deny:
- match: {namespaces: [shop], secrets: [edge-old]}
  reason: its key was in a log on 3 May
"""
NAME = SHOP


@pytest.fixture
async def world(tmp_path: Path, issuer: TokenIssuer) -> AsyncIterator[World]:
    world = secrets_world(tmp_path, issuer, POLICY)
    async with world.running():
        yield world


@pytest.fixture
async def controller(world: World) -> AsyncIterator[Controller]:
    async with world.channel() as channel:
        yield Controller(world, channel)


async def test_secret_gets_a_certificate_without_spiffe_id(world: World, controller: Controller) -> None:
    answer = await controller.issue(NAME, "a.shop.example.com", duration=timedelta(hours=48))
    leaf = leaf_of(answer.chain[0])
    assert [str(name) for name in names_of(leaf.extensions)] == [NAME, "a.shop.example.com"]
    assert timedelta(hours=47) < leaf.not_valid_after_utc - datetime.now(UTC) <= timedelta(hours=48)
    assert list(answer.trust) == [DEFAULT_ISSUER]
    assert not answer.interim
    assert world.events.all == []
    assert world.metric("certmount_authority_calls_total", method="Secrets.Issue", reason="Ok") == 1


async def test_audit_log_names_the_secret(controller: Controller) -> None:
    with capture_logs() as logs:
        await controller.issue()
        await controller.rejected("bank.example.com")
    issued, rejected = (entry for entry in logs if entry["event"] == "certificate")
    for entry in (issued, rejected):
        assert (entry["requester"], entry["namespace"], entry["issuer"]) == ("secret shop/shop-tls", "shop", "internal")
        assert {"pod", "service_account", "node"}.isdisjoint(entry)
    assert (issued["decision"], issued["rules"]) == ("issued", ("policy[0] (line 3)",))
    assert (rejected["decision"], rejected["reason"]) == ("rejected", "NameNotAllowed")


@pytest.mark.parametrize(
    "names,where,text",
    [
        (
            ["bank.example.com"],
            {},
            "bank.example.com: no policy rule allows this name for secret shop/shop-tls; ask an administrator to add a rule to the policy",
        ),
        ([NAME], {"namespace": "bank"}, "shop.example.com: no policy rule allows this name for secret bank/shop-tls"),
        ([NAME], {"secret": "other"}, "shop.example.com: no policy rule allows this name for secret shop/other"),
        (["pods.example.com"], {}, "pods.example.com: no policy rule allows this name for secret shop/shop-tls"),
        (["hello.default.svc"], {"namespace": "default"}, "no policy rule allows this name for secret default/shop-tls"),
        ([NAME], {"usages": [authority_pb2.USAGE_CLIENT]}, "usages: client is not a usage that policy[0] (line 3) allows"),
        ([NAME], {"issuer": "nowhere"}, "issuer: the authority has no issuer nowhere; use one of internal"),
        ([NAME], {"email": "a@example.com"}, "email: a@example.com is not the address of an ACME account that policy[0]"),
        ([NAME], {"secret": "edge-old"}, "secret shop/edge-old: is denied: its key was in a log on 3 May; ask an"),
    ],
)  # fmt: skip
async def test_what_no_rule_allows_is_refused_with_words(
    names: list[str], where: dict[str, Any], text: str, controller: Controller
) -> None:
    failure = await controller.rejected(*names, **where)
    assert failure.code is grpc.StatusCode.PERMISSION_DENIED
    assert text in failure.text


async def test_secret_never_gets_a_spiffe_id(world: World, controller: Controller) -> None:
    own = URI.parse("spiffe://cluster.local/ns/bank/sa/default")
    names = Names.of([DNSName.parse("www.bank.example.com")], [own])
    failure = await controller.rejected(csr=build_csr(world.key, names), namespace="bank")
    assert failure.reason == "NameNotAllowed"
    assert f"{own}: no policy rule allows this name for secret bank/shop-tls" in failure.text
    uris = Names.of([DNSName.parse("www.bank.example.com")], [URI.parse("https://bank.example.com/api")])
    answer = await controller.issue(csr=build_csr(world.key, uris), namespace="bank")
    assert set(names_of(leaf_of(answer.chain[0]).extensions)) == set(uris)


async def test_request_without_names_is_invalid(controller: Controller, world: World) -> None:
    failure = await controller.rejected(csr=world.csr())
    assert failure.text == "InvalidRequest: names: no name is requested; set a DNS name"


@pytest.mark.parametrize(
    "fields,text",
    [
        ({"secret": "../tls"}, "namespace, secret: is not the namespace and name of a Secret"),
        ({"secret": "a" * 254}, "namespace, secret: is not the namespace and name of a Secret"),
        ({"secret": ""}, "namespace, secret: is not the namespace and name of a Secret"),
        ({"namespace": "Shop"}, "namespace, secret: is not the namespace and name of a Secret"),
        ({"namespace": "shop/x"}, "namespace, secret: is not the namespace and name of a Secret"),
        ({"email": "not an address"}, "email: is not an email address of the form name@domain in ASCII"),
        ({"tsig_secret": "keys"}, "tsig_secret: is not NAMESPACE/NAME of a Secret"),
        ({"issuer": "i" * 254}, "issuer: is longer than 253 characters"),
        ({"usages": [7]}, "usages: has an unknown value"),
        ({"duration": timedelta(-1)}, "duration: is negative or out of range"),
    ],
)
async def test_invalid_field_is_refused_with_words(
    fields: dict[str, Any], text: str, controller: Controller, world: World
) -> None:
    failure = await controller.rejected(**fields)
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidRequest")
    assert text in failure.text
    assert world.reviewer.calls == 1


async def test_only_the_controllers_service_account_is_accepted(world: World, controller: Controller) -> None:
    token = world.issuer.controller_token
    expected = (
        "expected certmount/certmount-secrets; set the authority's --secrets-service-account to the service account"
    )
    others = [Pod(), DRIVER, replace(CONTROLLER, namespace="shop"), replace(CONTROLLER, service_account="other")]
    for other in others:
        failure = await controller.rejected(token=token(other))
        assert failure.reason == "TokenRejected"
        account = f"{other.namespace}/{other.service_account}"
        assert f"controller token: belongs to service account {account}; {expected}" in failure.text
    assert world.reviewer.calls == 0


async def test_tokens_of_other_audiences_are_rejected(world: World, controller: Controller) -> None:
    for token in (world.issuer.pod_token(CONTROLLER), world.issuer.node_token(), world.issuer.node_token(CONTROLLER)):
        failure = await controller.rejected(token=token)
        assert "controller token: has another audience; expected certmount-secrets" in failure.text
    assert "controller token: is missing" in (await controller.rejected(token=Secret(""))).text
    assert world.reviewer.calls == 0


async def test_token_of_a_deleted_controller_is_rejected(world: World, controller: Controller) -> None:
    world.reviewer.controller = replace(CONTROLLER.reviewed, pod_uid="another")
    failure = await controller.rejected()
    assert (
        "controller token: its claims and the API server's TokenReview name different values for pod UID"
        in failure.text
    )


async def test_controllers_token_is_no_node_or_pod_token(world: World) -> None:
    async with world.channel() as channel:
        stub = authority_pb2_grpc.AuthorityStub(channel)
        token = world.issuer.controller_token().reveal()
        request = authority_pb2.IssueRequest(csr=world.csr(NAME), pod_token=world.issuer.pod_token(Pod()).reveal())
        failure = await failure_of(stub.Issue(request, metadata=(("authorization", f"Bearer {token}"),)))
        assert "node token: has another audience" in failure.text
        request.pod_token = token
        node = world.issuer.node_token().reveal()
        failure = await failure_of(stub.Issue(request, metadata=(("authorization", f"Bearer {node}"),)))
        assert "pod token: has another audience" in failure.text


async def test_service_is_off_by_default(idle_world: World) -> None:
    async with idle_world.running(), idle_world.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await Controller(idle_world, channel).issue()
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_trust_stream_contains_the_environments_and_is_no_node(world: World, controller: Controller) -> None:
    stream = controller.watch()
    bundle = await stream.read()
    assert dict(bundle.environments) == {"internal": "internal"}
    assert bundle.sets[DEFAULT_ISSUER].roots
    assert world.server._trust.nodes == frozenset()
    stream.cancel()
    failure = await failure_of(controller.watch(world.issuer.node_token()).read())
    assert "controller token: has another audience" in failure.text


async def test_flood_of_one_secret_leaves_the_others(controller: Controller) -> None:
    calls = (failure_or_none(controller) for _ in range(SECRET_RATE.burst + 10))
    failures = [failure for failure in await asyncio.gather(*calls) if failure]
    text = "TooManyRequests: secret shop/shop-tls: exceeds the authority's rate limit; retry after"
    assert len(failures) >= 9
    assert all(failure.startswith(text) for failure in failures)
    assert (await controller.issue(secret="edge-1")).chain
    assert (await controller.issue("www.bank.example.com", namespace="bank")).chain


async def failure_or_none(controller: Controller, **fields: Any) -> str | None:
    try:
        await controller.issue(**fields)
    except grpc.aio.AioRpcError as error:
        return str(error.details())
    return None
