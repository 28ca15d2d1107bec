"""Pods that start wait for nothing but a busy authority, in the order of their coming, and not for ever."""

from __future__ import annotations

import asyncio

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.spec import CertificateSpec
from csi_driver.node.authority_messages import IssuanceResponse
from csi_driver.node.issuance.first_calls import FIRST_SIDE_BY_SIDE, PATIENCE_S, FirstCalls
from tests.unit.node.virtual_time import run_virtually

_ANSWER = IssuanceResponse([b"chain"], {}, None)


class _Authority:
    """Takes so many at once, a second each; refuses what is beyond, or everything."""

    def __init__(self, places: int, failure: CertmountError | None = None) -> None:
        self.places = places
        self.failure = failure
        self.under_way = 0
        self.most = 0
        self.calls = 0
        self.order: list[bytes] = []

    async def issue(self, csr: bytes, _token: Secret[str], _spec: CertificateSpec) -> IssuanceResponse:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        if self.under_way >= self.places:
            raise CertmountError(Reason.AUTHORITY_OVERLOADED, "busy")
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(1)
        self.under_way -= 1
        self.order.append(csr)
        return _ANSWER


def _ask(authority: _Authority, pods: int) -> tuple[list[IssuanceResponse | BaseException], float]:
    """All pods at once; the answers and when the last one came."""

    async def story() -> tuple[list[IssuanceResponse | BaseException], float]:
        calls = FirstCalls(authority, lambda: 0.5)
        clock = asyncio.create_task(calls.turns.run())
        asked = (calls.issue(bytes([number]), Secret("token"), CertificateSpec()) for number in range(pods))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        ended = asyncio.get_running_loop().time()
        assert not calls._waiting
        clock.cancel()
        await asyncio.wait([clock])
        return list(answers), ended

    return run_virtually(story())


def test_side_by_side_and_in_order() -> None:
    """Sixteen at once while all is well; whoever came first is served first."""
    authority = _Authority(places=1000)
    answers, ended = _ask(authority, 48)
    assert answers == [_ANSWER] * 48
    assert (authority.most, round(ended), authority.calls) == (FIRST_SIDE_BY_SIDE, 3, 48)
    for begin in range(0, 48, FIRST_SIDE_BY_SIDE):
        served = sorted(authority.order[begin : begin + FIRST_SIDE_BY_SIDE])
        assert served == [bytes([number]) for number in range(begin, begin + FIRST_SIDE_BY_SIDE)]


def test_a_busy_authority_is_asked_again_here() -> None:
    """The kubelet hears nothing of it, and the authority few more calls than it signs."""
    authority = _Authority(places=4)
    answers, _ = _ask(authority, 60)
    assert answers == [_ANSWER] * 60
    assert authority.calls <= 2 * 60


def test_patience_ends() -> None:
    """An authority that takes no one: after a minute or so the kubelet hears why, within its own two."""
    answers, ended = _ask(_Authority(places=0), 30)
    assert {answer.reason for answer in answers if isinstance(answer, CertmountError)} == {Reason.AUTHORITY_OVERLOADED}
    assert len(answers) == 30
    assert ended <= PATIENCE_S + 1


@pytest.mark.parametrize(
    "reason", [Reason.AUTHORITY_UNAVAILABLE, Reason.NAME_NOT_ALLOWED, Reason.SERVICE_ACCOUNT_DENIED]
)
def test_other_failures_are_told_at_once(reason: Reason) -> None:
    """No one waits for what waiting does not change, or for an outage: the reason goes to the pod's events."""
    answers, ended = _ask(_Authority(1000, CertmountError(reason, "no")), 50)
    assert {answer.reason for answer in answers if isinstance(answer, CertmountError)} == {reason}
    assert ended < 1


def test_a_kubelet_that_gives_up_leaves_no_trace() -> None:
    """Its place in the queue and its turn are others' then."""
    authority = _Authority(places=1000)

    async def story() -> None:
        calls = FirstCalls(authority, lambda: 0.5)
        clock = asyncio.create_task(calls.turns.run())
        first = [
            asyncio.create_task(calls.issue(b"", Secret("token"), CertificateSpec()))
            for _ in range(2 * FIRST_SIDE_BY_SIDE)
        ]
        await asyncio.sleep(0.5)
        for task in first:
            task.cancel()
        await asyncio.wait(first)
        assert not calls._waiting
        assert await calls.issue(b"", Secret("token"), CertificateSpec()) == _ANSWER
        clock.cancel()
        await asyncio.wait([clock])

    run_virtually(story())
