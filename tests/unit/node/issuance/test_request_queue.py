"""First requests wait only for a busy authority; renewals also wait for the end of an outage."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.node.issuance.issuer_queue import MAX_FIRST_REQUESTS, MAX_RENEWALS
from csi_driver.node.issuance.request_queue import MAX_WAIT_S, RequestQueue
from csi_driver.rpc.authority_messages import IssuanceResponse
from tests.unit.node.certificates import pod_named
from tests.unit.node.virtual_time import in_virtual_time

_RESPONSE = IssuanceResponse([b"chain"], {}, None)
_TOKEN: Secret[str] = Secret("token")
_SPEC = CertificateSpec()


def _now() -> float:
    return asyncio.get_running_loop().time()


class Authority:
    """Handles ``capacity`` requests at the same time, one second each; rejects others, or all with ``failure``."""

    def __init__(self, capacity: int = 1000, failure: CertmountError | None = None) -> None:
        self.capacity = capacity
        self.failure = failure
        self.in_progress = 0
        self.most = 0
        self.calls = 0
        self.order: list[bytes] = []
        self.queue = RequestQueue(self, _now, lambda: 0.5)

    async def issue(self, csr: bytes, _token: Secret[str], _spec: CertificateSpec, /) -> IssuanceResponse:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        if self.in_progress >= self.capacity:
            raise CertmountError(Reason.AUTHORITY_OVERLOADED, "busy")
        self.in_progress += 1
        self.most = max(self.most, self.in_progress)
        self.order.append(csr)
        try:
            await asyncio.sleep(1)
        finally:
            self.in_progress -= 1
        return _RESPONSE

    async def check(self, csr: bytes, token: Secret[str], spec: CertificateSpec, /) -> None:
        await self.issue(csr, token, spec)

    def first(
        self, csr: bytes = b"", spec: CertificateSpec = _SPEC, namespace: str | None = None
    ) -> Awaitable[IssuanceResponse]:
        """By default, each pod has its own namespace."""
        pod = f"pod-{csr!r}"
        return self.queue.issue_first(csr, _TOKEN, spec, pod_named(pod, pod if namespace is None else namespace))

    async def renew(self, volume_id: str, not_after: float) -> float:
        """Return the seconds by which the renewal was postponed."""
        async with self.queue.renewal_turn("internal", pod_named(volume_id), volume_id, not_after) as postponed_s:
            if not postponed_s:
                await self.queue.issue(volume_id.encode(), _TOKEN, _SPEC)
            return postponed_s


async def _issue_first(authority: Authority, pods: int) -> list[IssuanceResponse | BaseException]:
    calls = [authority.first(number.to_bytes(2)) for number in range(pods)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(queue.idle for queue in authority.queue._queues.values())
    return list(results)


def _reasons(results: list[IssuanceResponse | BaseException]) -> list[Reason]:
    return [result.reason for result in results if isinstance(result, CertmountError)]


@in_virtual_time
async def test_first_requests_start_in_order_up_to_the_limit() -> None:
    authority = Authority()
    requests = 3 * MAX_FIRST_REQUESTS
    assert await _issue_first(authority, requests) == [_RESPONSE] * requests
    assert (authority.most, round(_now()), authority.calls) == (MAX_FIRST_REQUESTS, 3, requests)
    for start in range(0, requests, MAX_FIRST_REQUESTS):
        served = sorted(authority.order[start : start + MAX_FIRST_REQUESTS])
        assert served == [number.to_bytes(2) for number in range(start, start + MAX_FIRST_REQUESTS)]


@in_virtual_time
async def test_queue_retries_first_requests_while_the_authority_is_overloaded() -> None:
    """The kubelet does not see these failures, and the authority gets few more requests than it can handle."""
    authority = Authority(capacity=4)
    assert await _issue_first(authority, 60) == [_RESPONSE] * 60
    assert authority.calls <= 2 * 60


@in_virtual_time
async def test_namespace_with_many_slow_requests_leaves_half_of_the_places_to_others() -> None:
    authority = Authority()
    flood = [asyncio.ensure_future(authority.first(bytes([number]), namespace="flood")) for number in range(200)]
    await asyncio.sleep(0.5)
    assert authority.in_progress == MAX_FIRST_REQUESTS // 2
    began = _now()
    await authority.first(b"victim", namespace="victim")
    assert _now() - began < 1.1
    await asyncio.gather(*flood)


@in_virtual_time
@pytest.mark.parametrize("reason", [Reason.SHARE_EXCEEDED, Reason.TOO_MANY_REQUESTS])
async def test_request_that_exceeds_a_share_is_retried_without_holding_a_place(reason: Reason) -> None:
    authority = Authority(failure=CertmountError(reason, "namespace web holds too many"))
    refused = [asyncio.ensure_future(authority.first(bytes([number]), namespace="web")) for number in range(50)]
    await asyncio.sleep(10)
    assert (authority.in_progress, authority.calls) == (0, 50 * 4)
    authority.failure, began = None, _now()
    await authority.first(b"victim", namespace="victim")
    assert _now() - began < 1.1
    assert await asyncio.gather(*refused) == [_RESPONSE] * 50
    assert _now() < MAX_WAIT_S


@in_virtual_time
async def test_request_that_exceeds_a_share_for_a_minute_fails() -> None:
    authority = Authority(failure=CertmountError(Reason.SHARE_EXCEEDED, "namespace web holds too many"))
    assert _reasons(await _issue_first(authority, 1)) == [Reason.SHARE_EXCEEDED]
    assert 30 < _now() <= MAX_WAIT_S


@in_virtual_time
async def test_first_request_fails_after_a_minute_of_overload() -> None:
    assert _reasons(await _issue_first(Authority(capacity=0), 30)) == [Reason.AUTHORITY_OVERLOADED] * 30
    assert _now() <= MAX_WAIT_S + 1


@in_virtual_time
@pytest.mark.parametrize(
    "reason", [Reason.AUTHORITY_UNAVAILABLE, Reason.NAME_NOT_ALLOWED, Reason.SERVICE_ACCOUNT_DENIED]
)
async def test_other_failures_reach_the_kubelet_immediately(reason: Reason) -> None:
    """Waiting does not help, and the pod's events must show the reason."""
    authority = Authority(failure=CertmountError(reason, "no"))
    assert _reasons(await _issue_first(authority, 50)) == [reason] * 50
    assert _now() < 1


@in_virtual_time
async def test_cancelled_request_leaves_the_queue() -> None:
    authority = Authority()
    requests = [asyncio.ensure_future(authority.first()) for _ in range(2 * MAX_FIRST_REQUESTS)]
    await asyncio.sleep(0.5)
    for request in requests:
        request.cancel()
    await asyncio.wait(requests)
    assert await authority.first() == _RESPONSE


@in_virtual_time
async def test_internal_ca_does_not_wait_for_external_issuers() -> None:
    authority = Authority()
    slow = [asyncio.ensure_future(authority.first(spec=CertificateSpec(issuer="slow"))) for _ in range(500)]
    await asyncio.sleep(0)
    began = _now()
    await authority.first()
    assert _now() - began < 1.1
    await asyncio.gather(*slow)


@in_virtual_time
async def test_renewals_start_with_the_earliest_expiry() -> None:
    authority = Authority()
    await asyncio.gather(*(authority.renew(str(number), 1e6 - number) for number in range(50)))
    assert authority.most <= MAX_RENEWALS
    # The first renewal starts before the others arrive.
    assert [int(csr) for csr in authority.order] == [0, *range(49, 0, -1)]


@in_virtual_time
async def test_renewals_wait_for_the_end_of_an_outage_and_are_then_postponed() -> None:
    authority = Authority(failure=CertmountError(Reason.AUTHORITY_UNAVAILABLE, "connection refused"))
    with pytest.raises(CertmountError):
        await authority.renew("probe", 1e6)
    assert authority.queue.outage("internal") is authority.failure
    renewals = [asyncio.ensure_future(authority.renew(f"later-{number}", 1e6)) for number in range(10)]
    expired = asyncio.ensure_future(authority.renew("expired", 1.0))
    await asyncio.sleep(0.2)
    assert authority.calls == 1
    assert authority.queue.renewals_waiting() == 11
    authority.failure = None
    assert await expired == 0
    assert authority.queue.outage("internal") is None
    ended = _now()
    assert {0 < await renewal <= ended for renewal in renewals} == {True}
    assert authority.order == [b"expired"]


@in_virtual_time
@pytest.mark.parametrize("is_renewal", [False, True])
async def test_checks_for_an_unavailable_issuer_delay_no_renewals_of_the_internal_ca(is_renewal: bool) -> None:
    """A pod repeats them as often as it likes, and pods that share certificates of the issuer need them for each renewal."""
    authority = Authority(failure=CertmountError(Reason.ISSUER_UNAVAILABLE, "the roots of acme are not known yet"))
    spec, queue = CertificateSpec(issuer="acme"), authority.queue
    check = queue.check(b"", _TOKEN, spec) if is_renewal else queue.check_first(b"", _TOKEN, spec, pod_named("web"))
    with pytest.raises(CertmountError):
        await check
    assert (queue.outage("internal"), queue.outage("acme")) == (None, authority.failure)
    authority.failure, began = None, _now()
    assert await asyncio.gather(*(authority.renew(str(number), 1e6) for number in range(2))) == [0, 0]
    assert _now() - began < 2.1


@in_virtual_time
async def test_checks_notice_that_the_authority_is_unavailable() -> None:
    authority = Authority(failure=CertmountError(Reason.AUTHORITY_UNAVAILABLE, "connection refused"))
    with pytest.raises(CertmountError):
        await authority.queue.check(b"", _TOKEN, CertificateSpec(issuer="acme"))
    assert authority.queue.outage("internal") is authority.failure


@in_virtual_time
async def test_renewal_of_a_removed_volume_leaves_the_queue() -> None:
    authority = Authority(failure=CertmountError(Reason.AUTHORITY_UNAVAILABLE, "connection refused"))
    with pytest.raises(CertmountError):
        await authority.renew("probe", 1e6)
    renewal = asyncio.ensure_future(authority.renew("removed", 1e6))
    await asyncio.sleep(0)
    authority.queue.cancel_renewal("removed")
    assert await renewal == float("inf")
    assert authority.queue.renewals_waiting() == 0
    assert authority.calls == 1


@in_virtual_time
@pytest.mark.parametrize("reason", [Reason.ISSUER_NOT_FOUND, Reason.AUTHORITY_UNAVAILABLE])
async def test_queues_of_unknown_issuers_are_removed(reason: Reason) -> None:
    """Pods can name any issuer, also while the authority is unavailable."""
    authority = Authority(failure=CertmountError(reason, "no"))
    for number in range(1000):
        with pytest.raises(CertmountError):
            await authority.first(spec=CertificateSpec(issuer=f"issuer-{number}"))
    assert len(authority.queue._queues) <= 100
