"""Events as the API server gets them, also from two replicas at once."""

from __future__ import annotations

import pytest
from kubernetes.aio import client

from csi_driver.core.cluster.objects import EventRejected, PodEvent, RecordedEvent
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.events import EventClient
from tests.unit.kube.api_server import FakeApiServer

EVENT = PodEvent(
    name="hello-0.0123456789abcdef",
    namespace="web",
    pod_name="hello-0",
    pod_uid="pod-uid",
    warning=True,
    reason="NameNotAllowed",
    message="shop.example.com: no rule allows it",
    first_at=1_800_000_000.25,
)
KEY = "web/hello-0.0123456789abcdef"


async def test_an_event_is_about_the_pod(server: FakeApiServer, api: client.ApiClient) -> None:
    """All fields that events.k8s.io/v1 asks for; the uid keeps it apart from a successor of the same name."""
    await EventClient(api, "certmount-authority-7d-x").create(EVENT)
    event = server.events[KEY]
    assert event["metadata"] == {"name": EVENT.name, "namespace": "web", "resourceVersion": "1"}
    del event["metadata"]
    assert event == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "eventTime": "2027-01-15T08:00:00.250000Z",
        "reportingController": "certmount.dev/authority",
        "reportingInstance": "certmount-authority-7d-x",
        "action": "IssueCertificate",
        "reason": "NameNotAllowed",
        "type": "Warning",
        "note": "shop.example.com: no rule allows it",
        "regarding": {"apiVersion": "v1", "kind": "Pod", "namespace": "web", "name": "hello-0", "uid": "pod-uid"},
    }


async def test_what_repeats_is_counted_in_its_series(server: FakeApiServer, api: client.ApiClient) -> None:
    """By one patch, which two replicas can't lose to each other."""
    events = EventClient(api, "one")
    written = await events.create(EVENT)
    assert await events.repeat(EVENT, written, 4, 1_800_000_060.0) == RecordedEvent("2", 5)
    assert server.events[KEY]["series"] == {"count": 5, "lastObservedTime": "2027-01-15T08:01:00.000000Z"}
    assert [method for method, _, _ in server.requests] == ["POST", "PATCH"]


async def test_two_replicas_count_in_one_event(server: FakeApiServer, api: client.ApiClient) -> None:
    """Neither makes a second one, and no count is lost; create and patch are all that is used."""
    one, other = EventClient(api, "one"), EventClient(api, "other")
    first = await one.create(EVENT)
    second = await other.create(EVENT)
    assert (len(server.events), second.count) == (1, 2)
    assert (await one.repeat(EVENT, first, 3, 1_800_000_060.0)).count == 5
    assert (await other.repeat(EVENT, second, 1, 1_800_000_061.0)).count == 6
    assert {method for method, _, _ in server.requests} == {"POST", "PATCH"}
    assert server.events[KEY]["reportingInstance"] == "one"


@pytest.mark.parametrize("status", [400, 403, 404, 422])
async def test_what_will_never_be_taken_is_told_apart(
    status: int, server: FakeApiServer, api: client.ApiClient
) -> None:
    """As in a namespace that is being deleted."""
    server.fail = (status, b'{"message": "because it is being terminated"}')
    with pytest.raises(EventRejected, match=f"answers {status}"):
        await EventClient(api, "one").create(EVENT)


@pytest.mark.parametrize(
    "status,body", [(500, b"{}"), (429, b"{}"), (401, b"{}"), (409, b"{}"), (200, b"[]"), (200, b"{}")]
)
async def test_what_may_pass_is_tried_again(
    status: int, body: bytes, server: FakeApiServer, api: client.ApiClient
) -> None:
    """Whatever else it is."""
    server.fail = (status, body)
    with pytest.raises(CertmountError) as failure:
        await EventClient(api, "one").create(EVENT)
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE
