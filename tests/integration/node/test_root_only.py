"""Volumes with only roots: they need no request, follow changes of the roots, and count for acknowledgements."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.spec import DEFAULT_ISSUER
from tests.integration.node.test_files import files, roots_of
from tests.integration.node.world import Node, Request
from tests.support.call_failures import CallFailure, failure_of
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import TestCA
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT_ONLY = {"root-only": "true"}
PARTNER = ROOT_ONLY | {"federations": "partner"}


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def own_roots(node: Node) -> AsyncIterator[None]:
    await node.watched()
    yield
    await node.reset()
    node.authority.external_issuers.clear()
    for name in [name for name in node.authority.sets if name != DEFAULT_ISSUER]:
        del node.authority.sets[name]
    await node.authority.trust(node.authority.ca.der)


async def _published(node: Node, request: Request) -> Request:
    """Publish a volume. Retry like the kubelet while the driver has not received the sets that the authority sends."""
    async with asyncio.timeout(60):
        while True:
            try:
                await node.publish(request)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
            else:
                return request


async def _refused(node: Node, attributes: dict[str, str], text: str) -> CallFailure:
    """Publish a volume until the error has this text: the driver may not have received what the authority sends."""
    request = node.request(attributes=ROOT_ONLY | attributes)
    async with asyncio.timeout(60):
        while True:
            refused = await failure_of(node.publish(request))
            node.assert_nothing_of(request)
            if refused.text == text:
                return refused
            await asyncio.sleep(0.05)


def _acknowledged(node: Node, name: str = DEFAULT_ISSUER) -> bool:
    return node.authority.acknowledged_generation(name) == node.authority.sets[name].generation


def _roots(node: Node, request: Request) -> list[bytes]:
    return [root.public_bytes(Encoding.DER) for root in x509.load_pem_x509_certificates(_shown(node, request))]


def _shown(node: Node, request: Request) -> bytes:
    found = files(node, request)
    assert found.keys() == {"root.crt", "generation.json"}
    return found["root.crt"]


async def test_volume_has_only_roots_and_needs_no_request(node: Node) -> None:
    """Neither a token nor the authority is needed."""
    partner, own = TestCA("partner"), node.authority.ca
    await node.authority.trust(partner.der, name="partner")
    federated = await _published(node, node.request(attributes=PARTNER))
    await node.authority.stop()
    plain = node.request(attributes=ROOT_ONLY)
    plain.secrets.clear()
    plain.volume_context.pop("csi.storage.k8s.io/serviceAccount.tokens", None)
    await node.publish(plain)
    assert _roots(node, plain) == [own.der]
    assert _roots(node, federated) == [own.der, partner.der]
    fingerprints = [each.certificate.fingerprint(SHA256()).hex() for each in (own, partner)]
    summary = json.loads(files(node, federated)["generation.json"])
    certificate = ("serial", "not_before", "not_after", "renew_at", "issuer", "sha256")
    assert summary == {**dict.fromkeys(certificate), "roots_sha256": fingerprints}
    record = node.record(plain)
    assert (record["renew_at"], record["not_after"]) == (None, None)
    private = b"".join(path.read_bytes() for path in node.volume_dir(federated).rglob("*") if path.is_file())
    assert b"PRIVATE KEY" not in private
    assert (node.script.calls, node.script.checks, node.authority.reports) == (0, [], [])
    assert [await node.health(request) for request in (plain, federated)] == [[], []]
    await until(lambda: node.metric("certmount_node_volumes") == 2, "the metric")
    await until(lambda: node.metric("certmount_node_first_expiry_timestamp_seconds") == 0, "the metric")


async def test_new_roots_reach_the_volume_and_are_acknowledged(node: Node) -> None:
    partner, later, own = TestCA("partner").der, TestCA("later").der, node.authority.ca.der
    await node.authority.trust(partner, name="partner")
    request, store = (
        await _published(node, node.request(attributes=PARTNER)),
        await _published(node, node.request(attributes=PARTNER | {"files": "java"})),
    )
    first = files(node, store)
    assert first.keys() == {"truststore.p12", "keystore.password", "generation.json"}
    assert roots_of(first["truststore.p12"], first["keystore.password"]) == [own, partner]
    await node.authority.trust(own, later)
    await until(lambda: _roots(node, request) == [own, later, partner], "the new root")
    await until(lambda: _acknowledged(node), "the acknowledgement")
    last = files(node, store)
    assert last["keystore.password"] == first["keystore.password"]
    assert roots_of(last["truststore.p12"], last["keystore.password"]) == [own, later, partner]
    del node.authority.sets["partner"]
    await node.authority.send_bundle()
    await until(lambda: _roots(node, request) == [own, later], "the set of the partner is removed")
    assert node.script.calls == 0


@pytest.mark.root
async def test_volume_that_cannot_be_written_delays_the_acknowledgement(node: Node) -> None:
    """A CA rotation must wait for pods that only verify, too."""
    request, own, other = (
        await _published(node, node.request(attributes=ROOT_ONLY)),
        node.authority.ca.der,
        TestCA("another").der,
    )
    files_dir = node.volume_dir(request) / "private"
    moved = files_dir.rename(files_dir.with_name("elsewhere"))
    await node.authority.trust(own, other)
    await until(lambda: node.metric("certmount_node_volumes_roots_behind") == 1, "the failure")
    assert not _acknowledged(node)
    moved.rename(files_dir)
    await until(lambda: _roots(node, request) == [own, other], "the new root")
    await until(lambda: _acknowledged(node), "the acknowledgement")


async def test_damaged_copy_of_the_driver_is_replaced_with_the_next_roots(node: Node) -> None:
    """No renewal would repair the volume, and CA rotations would wait for it forever."""
    request, own, other = (
        await _published(node, node.request(attributes=ROOT_ONLY)),
        node.authority.ca.der,
        TestCA("another").der,
    )
    for path in (node.volume_dir(request) / "private").iterdir():
        path.write_bytes(b"garbage")
    await node.authority.trust(own, other)
    await until(lambda: _roots(node, request) == [own, other], "the new root")
    await until(lambda: _acknowledged(node), "the acknowledgement")


async def test_restarted_driver_restores_the_volume_and_waits_for_the_first_bundle(node: Node) -> None:
    pod, own, other = FakePod(), node.authority.ca.der, TestCA("another").der
    request = await _published(node, node.request(pod, ROOT_ONLY))
    state = node.state(request)
    await node.driver.kill()
    await node.authority.stop()
    await node.driver.start()
    await node.publish(node.kubelet.publish_request(pod, ROOT_ONLY))
    assert node.state(request) == state
    assert await node.health(request) == []
    problem = "roots: the authority has not sent them since the driver started"
    hint = "the kubelet retries; if this persists, see the driver's log"
    refused = await _refused(node, {}, f"AuthorityUnavailable: {problem}; {hint}")
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    await node.authority.start()
    new = await _published(node, node.request(attributes=ROOT_ONLY))
    await node.authority.trust(own, other)
    await until(lambda: _roots(node, request) == _roots(node, new) == [own, other], "the new root")
    assert node.script.calls == 0


@pytest.mark.root
async def test_volume_without_a_record_is_adopted(node: Node) -> None:
    pod, own, other = FakePod(), node.authority.ca.der, TestCA("another").der
    request = await _published(node, node.request(pod, ROOT_ONLY))
    await node.driver.kill()
    (node.volume_dir(request) / "record.json").write_bytes(b"{")
    await node.driver.start()
    await node.watched()
    await node.publish(node.kubelet.publish_request(pod, ROOT_ONLY))
    assert node.record(request)["not_after"] is None
    await node.authority.trust(own, other)
    await until(lambda: _roots(node, request) == [own, other], "the new root")
    assert (await node.health(request), node.script.calls) == ([], 0)


async def test_issuer_and_federations_that_the_authority_does_not_have(node: Node) -> None:
    """The errors are those of the authority for a certificate. A federation is no issuer."""
    await node.authority.trust(TestCA("partner").der, name="partner")
    acme = await node.add_issuer("acme", shared=False)
    only_acme = await _published(node, node.request(attributes=ROOT_ONLY | {"issuer": "acme"}))
    assert _roots(node, only_acme) == [acme.der]
    node.authority.external_issuers["starting"] = TestCA("starting")
    await node.authority.send_bundle()
    unknown = "the authority has no root set named {}; use one of acme, internal, partner"
    for attributes, text in (
        (
            {"issuer": "partner"},
            "IssuerNotFound: issuer: the authority has no issuer partner; use one of acme, internal, starting",
        ),
        ({"issuer": "starting"}, "IssuerUnavailable: the roots of issuer starting are not known yet"),
        ({"federations": "legacy, partner"}, f"FederationNotFound: federations: {unknown.format('legacy')}"),
    ):
        await _refused(node, attributes, text)


async def test_volumes_of_an_account_with_and_without_a_certificate(node: Node) -> None:
    """The driver looks for a shared certificate in the volumes of the account. One with only roots is no obstacle."""
    await node.add_issuer("acme", shared=True)
    attributes = {"issuer": "acme"}
    only_roots = await _published(node, node.request(attributes=ROOT_ONLY | attributes))
    certificate = await node.published(attributes=attributes | {"reuse-key": "true", "name": "shop.example.com"})
    assert _roots(node, only_roots) == [root.public_bytes(Encoding.DER) for root in node.shown(certificate).roots]
    assert (node.script.calls, node.metric("certmount_node_volumes")) == (1, 2)
    await until(
        lambda: node.metric("certmount_node_first_expiry_timestamp_seconds") == node.record(certificate)["not_after"],
        "the metric",
    )
    await node.unpublish(only_roots)
    node.assert_nothing_of(only_roots)


async def test_attributes_that_need_a_certificate_are_one_error(node: Node) -> None:
    refused = await failure_of(
        node.publish(node.request(attributes=ROOT_ONLY | {"name": "a.example", "duration": "1h"}))
    )
    assert refused.text == (
        "InvalidAttributes: volumeAttributes.root-only: cannot be combined with name, duration, because the volume has no "
        "certificate and no key; omit root-only, or the other attributes"
    )
