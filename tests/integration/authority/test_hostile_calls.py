"""Calls that never end, that are no messages, or that all fail: their callers alone are limited, and the log stays small.

A victim's calls during attacks on the same process succeed, and about as fast as without the attack.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.authn import limits
from csi_driver.authority.authn.limits import Rate
from csi_driver.authority.server import _GRPC_OPTIONS
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.names import URI, Names
from csi_driver.core.secret import Secret
from csi_driver.rpc import server
from tests.bench.table import percentile
from tests.integration.authority.test_command import Process
from tests.integration.authority.world import POD, SERVING_NAME, Caller, World, failure_of
from tests.support.authority_attacks import ATTACKS, ISSUE
from tests.support.machine import load_per_processor, peak_mb
from tests.support.tokens import DRIVER, Pod
from tests.support.waiting import until


def call_with(caller: Caller, *messages: bytes, end: bool = True, token: Secret[str] | None = None) -> Any:
    """Start an Issue call with any number of any messages; without ``end``, the request never ends."""

    async def send() -> Any:
        call: Any = caller.channel.stream_unary(ISSUE)(metadata=caller.bearer(token))
        for message in messages:
            await call.write(message)
        if end:
            await call.done_writing()
        return await call

    return send()


async def test_request_that_does_not_arrive_fails(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_RECEIVE_TIMEOUT_S", 0.1)
    failure = await failure_of(call_with(caller, end=False))
    assert failure.code is grpc.StatusCode.UNAVAILABLE  # retryable
    assert failure.text == "RequestTimeout: request: has not arrived within 0.1 s; the caller retries"
    await caller.issue()


@pytest.mark.parametrize("messages,text", [((b"\xff\xff",), "is not a valid message"), ((), "is missing")])
async def test_call_without_a_valid_message_fails(messages: tuple[bytes, ...], text: str, caller: Caller) -> None:
    assert (await failure_of(call_with(caller, *messages))).text == f"InvalidRequest: request: {text}"


async def test_request_without_a_valid_token_is_not_received(caller: Caller) -> None:
    """The call is rejected before its request has arrived, and its audit entry is the usual one."""
    with capture_logs() as logs:
        failure = await failure_of(call_with(caller, end=False, token=Secret("garbage")))
    assert failure.reason == "TokenRejected"
    (entry,) = (line for line in logs if line["event"] == "certificate")
    assert (entry["decision"], entry["reason"]) == ("rejected", "TokenRejected")


async def test_calls_without_their_request_have_a_share(idle_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CALLERS", 8)
    async with idle_world.running(), idle_world.channel() as channel:
        caller = Caller(idle_world, channel)
        waiting = [asyncio.ensure_future(call_with(caller, end=False)) for _ in range(5)]
        await until(lambda: any(call.done() for call in waiting), "a refusal")
        (refused,) = (call for call in waiting if call.done())
        assert (await failure_of(refused)).text == (
            "ShareExceeded: address 127.0.0.1: holds 4 of 8 calls whose request has not arrived and requests 1 more, which "
            "exceeds its share; wait until some of them end"
        )
        for call in waiting:
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("calls", ["unary", "stream"])
async def test_rejected_calls_do_not_fill_the_log(idle_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FAILURE_RATE", Rate(0.001, 3))
    monkeypatch.setattr(limits, "_FAILURE_DELAY_S", 0.5)
    async with idle_world.running(), idle_world.channel() as channel:
        caller = Caller(idle_world, channel)
        with capture_logs() as logs:
            start = time.monotonic()
            await asyncio.gather(*(caller.rejected(pod=Secret("garbage")) for _ in range(50)))
            assert time.monotonic() - start >= 0.25
            await caller.issue()
        decisions = [line["decision"] for line in logs if line["event"] == "certificate"]
        assert decisions == ["rejected"] * 3 + ["issued"]
        assert len([line for line in logs if line["event"] == "call failed"]) == 3
        assert idle_world.metric("certmount_authority_calls_total", method="Issue", reason="TokenRejected") == 50


async def test_number_of_connections_is_limited(idle_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [(name, 3 if name == "grpc.max_allowed_incoming_connections" else value) for name, value in _GRPC_OPTIONS]
    monkeypatch.setattr("csi_driver.authority.server._GRPC_OPTIONS", options)
    async with idle_world.running(), contextlib.AsyncExitStack() as channels:
        callers = [Caller(idle_world, await channels.enter_async_context(idle_world.channel())) for _ in range(4)]
        for caller in callers[:3]:
            await caller.issue()
        assert (await callers[3].rejected()).code is grpc.StatusCode.UNAVAILABLE
        await callers[0].issue()


@pytest.mark.parametrize("calls", ["unary", "stream"])
async def test_lines_about_rejected_calls_are_short(world: World, caller: Caller) -> None:
    uris = [URI.parse(f"https://example.com/{number:03}{'a' * 580}") for number in range(100)]
    with capture_logs() as logs:
        assert (await caller.rejected(csr=build_csr(world.key, Names.of([], uris)))).reason != "InvalidCSR"
    (entry,) = (line for line in logs if line["event"] == "certificate")
    assert entry["requested_names"] == [*(uri.text for uri in uris[:6]), "and 94 more"]
    assert len(str(logs)) < 16 * 1024


VICTIM_DRIVER = replace(DRIVER, name="certmount-node-v", node="node-v", node_uid="node-v-uid", uid="driver-v")
VICTIM = Pod("bank-0", "bank", "bank", "node-v", "bank-uid", "node-v-uid", "bank-account-uid")
_CALLS = 60
_MAX_MB = 512  # the memory limit of the authority's Deployment


@dataclass(frozen=True)
class Measured:
    """Durations of the victim's calls in milliseconds, and the authority's peak memory in MB."""

    times: list[float]
    peak_mb: float

    def __str__(self) -> str:
        p50, p95, p99 = (percentile(self.times, share) for share in (0.5, 0.95, 0.99))
        return f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, peak {self.peak_mb:.0f} MB"


async def measure(world: World, port: int, pid: int) -> Measured:
    """Issue certificates for the victim, one after the other, as its node driver does."""
    node = (("authorization", f"Bearer {world.issuer.node_token(VICTIM_DRIVER).reveal()}"),)
    times = []
    async with world.channel(port=port) as channel:
        stub = authority_pb2_grpc.AuthorityStub(channel)
        for number in range(_CALLS):
            pod = replace(VICTIM, name=f"bank-{number}", uid=f"bank-{number}")
            request = authority_pb2.IssueRequest(csr=world.csr(), pod_token=world.issuer.pod_token(pod).reveal())
            start = time.perf_counter()
            await stub.Issue(request, metadata=node, timeout=30)
            times.append((time.perf_counter() - start) * 1000)
            await asyncio.sleep(0.01)
    return Measured(times, peak_mb(pid))


@contextmanager
def attacking(attack: str, world: World, port: int) -> Iterator[None]:
    file = world.folder / f"{attack}.json"
    arguments = {
        "port": port,
        "name": SERVING_NAME,
        "roots": (world.ca / "authority.crt").read_text(),
        "node_token": world.issuer.node_token().reveal(),
        "pod_tokens": [world.issuer.pod_token(replace(POD, uid=f"pod-{number}")).reveal() for number in range(250)],
        "csr": base64.b64encode(world.csr()).decode(),
    }
    file.write_text(json.dumps(arguments))
    command = [sys.executable, "-m", "tests.support.authority_attacks", attack, str(file)]
    with subprocess.Popen(command) as process:
        try:
            yield
            assert process.poll() is None, "the attack ended"
        finally:
            process.kill()


@pytest.mark.alone
@pytest.mark.timeout(240)
@pytest.mark.parametrize("attack", ATTACKS)
async def test_victim_is_served_during_an_attack(attack: str, idle_world: World) -> None:
    process = Process(idle_world)
    async with process.running() as running:
        quiet = await measure(idle_world, process.port, running.pid)
        with attacking(attack, idle_world, process.port):
            await asyncio.sleep(2)  # about until the attack is at its peak: a flood has no other sign from outside
            attacked = await measure(idle_world, process.port, running.pid)
            assert process.get("/readyz") == (200, "ok\n")
        recovered = await measure(idle_world, process.port, running.pid)
        log_mb = process.log.stat().st_size / 1e6
    print(f"{attack}: quiet {quiet}; attack {attacked}; afterwards {recovered}; log {log_mb:.1f} MB")
    # How slow the slowest calls are depends on what else the machine does. An attack that is not limited delays all of them.
    assert percentile(attacked.times, 0.5) < 1000 * load_per_processor()
    assert attacked.peak_mb < _MAX_MB
