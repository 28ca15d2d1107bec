"""The key and CSR of a request are kept for its retries."""

from __future__ import annotations

from dataclasses import replace

from csi_driver.core.spec import KeyType, Usage
from csi_driver.node.issuance.certificate_request import RequestKey
from csi_driver.node.issuance.pending_requests import PendingRequests
from tests.unit.node.certificates import KEY, POD, SPEC, prepared_request

_HOUR = 3600.0


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_retry_uses_the_same_request_until_there_is_a_final_result() -> None:
    pending, prepared = PendingRequests(Clock()), prepared_request()
    assert pending.get(KEY) is None
    pending.put(KEY, prepared)
    assert pending.get(KEY) is prepared
    pending.remove(KEY)
    pending.remove(KEY)
    assert pending.get(KEY) is None


def test_other_requests_use_other_keys() -> None:
    pending = PendingRequests(Clock())
    pending.put(RequestKey.of(POD, SPEC, "volume"), prepared_request())
    others = [
        RequestKey.of(POD, SPEC),
        RequestKey.of(POD, SPEC, "other"),
        RequestKey.of(replace(POD, namespace="other"), SPEC, "volume"),
        RequestKey.of(replace(POD, service_account="other"), SPEC, "volume"),
        RequestKey.of(POD, replace(SPEC, key_type=KeyType.ED25519), "volume"),
        RequestKey.of(POD, replace(SPEC, usages=(Usage.CLIENT,)), "volume"),
        RequestKey.of(POD, replace(SPEC, issuer="other"), "volume"),
    ]
    assert [pending.get(other) for other in others] == [None] * len(others)


def test_request_is_removed_an_hour_after_its_last_retry() -> None:
    clock = Clock()
    pending = PendingRequests(clock)
    other = RequestKey.of(POD, SPEC, "other")
    pending.put(KEY, prepared_request())
    pending.put(other, prepared_request())
    clock.now = _HOUR - 1
    pending.put(KEY, prepared_request())
    clock.now = _HOUR + 1
    assert pending.get(other) is None
    assert pending.get(KEY) is not None
    assert len(pending) == 1
    clock.now = 2 * _HOUR
    pending.remove_expired()
    assert len(pending) == 0


def test_namespace_that_uses_its_share_replaces_its_own_least_recently_used_request() -> None:
    pending = PendingRequests(Clock(), max_requests=9)
    other = RequestKey.of(replace(POD, namespace="other"), SPEC, "volume")
    pending.put(other, prepared_request())
    volumes = [RequestKey.of(POD, SPEC, f"volume-{number}") for number in range(5)]
    for volume in (*volumes[:2], volumes[0], *volumes[2:]):
        pending.put(volume, prepared_request())
    assert [volume for volume in volumes if pending.get(volume)] == volumes[3:]
    assert pending.get(other) is not None


def test_long_requests_take_more_of_the_share() -> None:
    pending, prepared = PendingRequests(Clock()), replace(prepared_request(), csr=bytes(56 * 1024))
    volumes = [RequestKey.of(POD, SPEC, f"volume-{number}") for number in range(100)]
    for volume in volumes:
        pending.put(volume, prepared)
    assert len(pending) == 41
    for volume in volumes:
        pending.put(volume, prepared_request())
        pending.put(volume, prepared)
        pending.remove(volume)
    assert len(pending) == 0
    for volume in volumes:
        pending.put(volume, prepared_request())
    assert len(pending) == 100


def test_repr_shows_no_key() -> None:
    assert repr(prepared_request()) == "PreparedRequest()"
