"""The order of the requests to one issuer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.node.issuance.issuer_queue import IssuerQueue, QueuedRequest, RequestClass


def _queue() -> IssuerQueue:
    return IssuerQueue("internal", lambda: 0.5)


def _drain(queue: IssuerQueue) -> list[QueuedRequest]:
    """Start all requests, one at a time."""
    started = []
    while (request := queue.start_next(0.0, 0.0)) is not None:
        started.append(request)
        queue.end(request)
    return started


_REQUESTS = st.lists(
    st.builds(QueuedRequest, st.sampled_from(RequestClass), st.sampled_from("abc"), st.floats(0, 100)), max_size=30
)


@given(_REQUESTS, st.sets(st.integers(0, 29)))
def test_first_requests_then_round_robin_over_pods_then_urgency(
    requests: list[QueuedRequest], cancelled: set[int]
) -> None:
    queue, expected = _queue(), []
    for number, request in enumerate(requests):
        earlier = [each for each in requests[:number] if each.waiting and each.request_class is request.request_class]
        share = sum(each.pod == request.pod for each in earlier)
        expected.append((request.request_class is RequestClass.RENEWAL, share, request.urgency, number))
        queue.add(request)
    for number in cancelled & set(range(len(requests))):
        queue.end(requests[number])
    order = [number for *_, number in sorted(expected) if number not in cancelled]
    assert [requests.index(request) for request in _drain(queue)] == order
    assert queue.idle


def test_pod_with_many_volumes_does_not_delay_other_pods() -> None:
    """It has 30 renewals; each of the other pods has one, with more time left."""
    queue = _queue()
    for number in range(30):
        queue.add(QueuedRequest(RequestClass.RENEWAL, "many", float(number)))
    for pod in ("one", "two"):
        queue.add(QueuedRequest(RequestClass.RENEWAL, pod, 100.0))
    assert [request.pod for request in _drain(queue)[:3]] == ["many", "one", "two"]


def test_renewals_in_progress_do_not_delay_first_requests() -> None:
    queue = _queue()
    for number in range(3):
        queue.add(QueuedRequest(RequestClass.RENEWAL, str(number), 0.0))
    assert queue.start_next(0.0, 0.0) is not None
    assert queue.start_next(0.0, 0.0) is None
    queue.add(QueuedRequest(RequestClass.FIRST, "new", 0.0))
    first = queue.start_next(0.0, 0.0)
    assert first is not None
    assert first.request_class is RequestClass.FIRST


def test_outage_pauses_renewals_only() -> None:
    queue = _queue()
    queue.record(queue.epochs, CertmountError(Reason.AUTHORITY_UNAVAILABLE, "connection refused"), 0.0)
    queue.add(QueuedRequest(RequestClass.RENEWAL, "a", 10.0))
    assert queue.start_next(0.0, 0.0) is None
    assert queue.wait_s(0.0, 0.0) == 1.0
    queue.add(QueuedRequest(RequestClass.FIRST, "b", 0.0))
    assert queue.start_next(0.0, 0.0) is not None
    assert not queue.idle
