"""Names with variables: each pod requests its own, and a restarted driver finds the same ones."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.node.world import Node, make_due
from tests.support.call_failures import failure_of
from tests.support.kubelet import FakePod
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_ATTRIBUTES = {
    "name": "${POD_NAME}.db.${POD_NAMESPACE}.svc",
    "dns-names": "${SERVICE_ACCOUNT_NAME}.${NODE_NAME}.example.com, u-${POD_UID}.example.com",
}


def _names(pod: FakePod) -> list[str]:
    own = f"u-{pod.uid}.example.com"
    return [f"{pod.name}.db.web.svc", "shop.node1.example.com", own, "spiffe://cluster.local/ns/web/sa/shop"]


async def test_pods_with_equal_attributes_get_their_own_names(node: Node) -> None:
    pods = [FakePod(name=f"db-{number}") for number in range(3)]
    requests = [node.request(pod, _ATTRIBUTES) for pod in pods]
    await asyncio.gather(*(node.publish(request) for request in requests))
    for pod, request in zip(pods, requests, strict=True):
        assert sorted(node.shown(request).names) == sorted(_names(pod))


@pytest.mark.parametrize("record", ["kept", "lost"])
async def test_restarted_driver_renews_with_the_same_names(node: Node, record: str) -> None:
    pod = FakePod(name="db-0")
    request = await node.published(pod, _ATTRIBUTES)
    before = node.shown(request)
    await make_due(node, request)
    if record == "lost":
        (node.volume_dir(request) / "record.json").unlink()
    await node.driver.start()
    await node.publish(node.kubelet.publish_request(pod, _ATTRIBUTES))
    if record == "lost":
        assert node.shown(request).serial == before.serial  # the files match the attributes
        assert not node.driver.events("adopted volume will be renewed now")
        await make_due(node, request)
        await node.driver.start()
        await node.publish(node.kubelet.publish_request(pod, _ATTRIBUTES))
    await until(lambda: node.shown(request).serial != before.serial, "renewed")
    assert node.shown(request).names == before.names


async def test_internationalized_and_wildcard_names_are_checked(node: Node) -> None:
    good = "*.shop.example.com, xn--bcher-kva.example, a.b.c.example.com"
    assert set(node.shown(await node.published(attributes={"dns-names": good})).names) > set(good.split(", "))
    wrong = {
        "bücher.example": "has non-ASCII characters; use the xn-- form of an internationalized name",
        "xn--a.example": "has the label 'xn--a', which is not the xn-- form of a label",
        "w*.example.com": "has a * that is not the complete first label",
        "*w.example.com": "has a * that is not the complete first label",
        "a.*.example.com": "has a * that is not the complete first label",
        "*.*.example.com": "has a * that is not the complete first label",
        "*.com": "is a wildcard for a top-level domain; use at least *.example.com",
        "*": "is a wildcard for a top-level domain",
    }
    failure = await failure_of(node.publish(node.request(attributes={"dns-names": ",".join(wrong)})))
    assert failure.reason == "InvalidAttributes"
    for name, problem in wrong.items():
        assert f"volumeAttributes.dns-names: {name!a} {problem}" in failure.text


async def test_pod_cannot_set_the_values_of_variables(node: Node) -> None:
    """The kubelet overrides its own keys, and the driver rejects other keys with the same prefix."""
    request = node.request(FakePod(name="db-0"), {"name": "${POD_NAME}.example.com", "POD_NAME": "admin"})
    with pytest.raises(Exception, match=r"volumeAttributes\.POD_NAME: is unknown"):
        await node.publish(request)
