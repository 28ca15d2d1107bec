"""Events on pods, created and counted by several replicas."""

from __future__ import annotations

import pytest

from csi_driver.core.cluster.objects import ClusterEvent, EventRejected, EventTarget, RecordedEvent
from csi_driver.core.errors import CertmountError
from csi_driver.kube.connection import Api
from csi_driver.kube.events import EventClient
from tests.unit.kube.api_server import FakeApiServer

EVENT = ClusterEvent(
    name="hello-0.0123456789abcdef",
    target=EventTarget("web", "hello-0", "pod-uid"),
    warning=True,
    reason="NameNotAllowed",
    message="shop.example.com: no rule allows it",
    first_at=1_800_000_000.25,
)
KEY = "web/hello-0.0123456789abcdef"


async def test_event_has_all_required_fields(server: FakeApiServer, api: Api) -> None:
    """The UID distinguishes the pod from a later one with the same name."""
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


async def test_repeated_event_increases_the_count(server: FakeApiServer, api: Api) -> None:
    events = EventClient(api, "one")
    written = await events.create(EVENT)
    assert await events.repeat(EVENT, written, 4, 1_800_000_060.0) == RecordedEvent("2", 5)
    assert server.events[KEY]["series"] == {"count": 5, "lastObservedTime": "2027-01-15T08:01:00.000000Z"}
    assert [method for method, _, _ in server.requests] == ["POST", "PATCH"]


async def test_two_replicas_increase_the_count_of_one_event(server: FakeApiServer, api: Api) -> None:
    one, other = EventClient(api, "one"), EventClient(api, "other")
    first = await one.create(EVENT)
    second = await other.create(EVENT)
    assert (len(server.events), second.count) == (1, 2)
    assert (await one.repeat(EVENT, first, 3, 1_800_000_060.0)).count == 5
    assert (await other.repeat(EVENT, second, 1, 1_800_000_061.0)).count == 6
    assert {method for method, _, _ in server.requests} == {"POST", "PATCH"}
    assert server.events[KEY]["reportingInstance"] == "one"


@pytest.mark.parametrize("status", [400, 403, 404, 422])
async def test_permanent_error_rejects_the_event(status: int, server: FakeApiServer, api: Api) -> None:
    """For example in a namespace that is being deleted."""
    server.fail = (status, b'{"message": "because it is being terminated"}')
    with pytest.raises(EventRejected, match=f"HTTP {status}"):
        await EventClient(api, "one").create(EVENT)


@pytest.mark.parametrize("status", [500, 429, 401])
async def test_other_errors_are_retryable(status: int, server: FakeApiServer, api: Api) -> None:
    server.fail = (status, b"{}")
    with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: "):
        await EventClient(api, "one").create(EVENT)


@pytest.mark.parametrize(
    "status,body,problem",
    [
        (409, b"{}", "other clients change it all the time"),
        (200, b"[]", "the response is too large or invalid"),
        (200, b"{", "the response is too large or invalid"),
        (200, b"[" * 100_000, "the response is too large or invalid"),
        (200, b'{"note": "' + b"x" * 200_000 + b'"}', "the response is too large or invalid"),
        (200, b"{}", "it has no resource version, or its series is invalid"),
        (200, b'{"metadata": {"resourceVersion": "1"}, "series": {"count": "x"}}', "it has no resource version, or "),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_event_that_the_owner_of_the_namespace_made_unusable_is_rejected(
    status: int, body: bytes, problem: str, server: FakeApiServer, api: Api
) -> None:
    """A temporary failure would delay the events of all namespaces."""
    server.fail = (status, body)
    with pytest.raises(EventRejected) as failure:
        await EventClient(api, "one").create(EVENT)
    assert str(failure.value).startswith(f"Event web/hello-0.0123456789abcdef: {problem}")
