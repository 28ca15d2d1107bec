"""Replicas of the authority die and are replaced under load, and no request fails."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.names import Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.node.authority_client import AuthorityClient
from csi_driver.rpc import authority_channel
from tests.e2e import authority, cluster, host
from tests.e2e.pods import Pod, manifest

NAMESPACE = "e2e-replicas"
PODS = [Pod(NAMESPACE, f"pod-{number}") for number in range(20)]
REQUESTS = 500
CLIENTS = 3  # a node can have eight streams, and a client has two while a replica shuts down
CONCURRENT = 10
SPEC = CertificateSpec(duration=timedelta(minutes=5))


@pytest.fixture(scope="module")
def tokens() -> list[Secret[str]]:
    """The tokens of twenty pods."""
    cluster.create_namespace(NAMESPACE)
    cluster.apply(*(manifest(pod, {}) for pod in PODS))
    cluster.wait_for("Ready", "pod", "--all", namespace=NAMESPACE, seconds=90)
    with ThreadPoolExecutor(4) as threads:
        return [Secret(token) for token in threads.map(lambda pod: authority.pod_token(NAMESPACE, pod.name), PODS)]


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the authority's Service for the driver's client; this machine does not use the cluster's DNS."""
    options = (*authority_channel._OPTIONS, ("grpc.ssl_target_name_override", authority.NAME))
    monkeypatch.setattr(authority_channel, "_OPTIONS", options)
    (tmp_path / "authority.crt").write_bytes(authority.serving_root())
    (tmp_path / "token").write_text(authority.node_token())
    return authority.service_address()


async def _issue(
    address: str, directory: Path, tokens: list[Secret[str]], after_each: Callable[[int], Awaitable[None]]
) -> set[int]:
    """Request certificates concurrently, and return their serial numbers; call ``after_each`` with the count so far.

    Raises the error of the first call that fails.
    """
    clients = [AuthorityClient(address, directory / "authority.crt", directory / "token") for _ in range(CLIENTS)]
    serials: set[int] = set()
    csr = build_csr(generate_key(KeyType.EC_P256), Names())

    async def run_client(number: int) -> None:
        for index in range(number, REQUESTS, CONCURRENT):
            issued = await clients[number % CLIENTS].issue(csr, tokens[index % len(tokens)], SPEC)
            serials.add(x509.load_der_x509_certificate(issued.chain[0]).serial_number)
            await after_each(len(serials))

    try:
        async with asyncio.TaskGroup() as running:
            for number in range(CONCURRENT):
                running.create_task(run_client(number))
    finally:
        for client in clients:
            await client.close()
    return serials


@pytest.mark.timeout(240)
def test_no_request_fails_when_a_replica_is_killed(address: str, tmp_path: Path, tokens: list[Secret[str]]) -> None:
    victim = host.process_of(host.authorities()[0])
    killed = ExitStack()
    killed.callback(os.kill, victim, signal.SIGKILL)

    async def kill_once(count: int) -> None:
        if count >= 100:
            killed.close()

    assert len(asyncio.run(_issue(address, tmp_path, tokens, kill_once))) == REQUESTS
    cluster.wait_for_rollout()


@pytest.mark.timeout(300)
def test_no_request_fails_during_a_rolling_update(address: str, tmp_path: Path, tokens: list[Secret[str]]) -> None:
    before = {pod["metadata"]["uid"] for pod in host.authorities()}
    cluster.kubectl("-n", cluster.CERTMOUNT, "rollout", "restart", "deployment/certmount-authority")

    async def pause(_count: int) -> None:
        # Spread the requests over the whole rollout, so that some are in flight when a replica stops.
        await asyncio.sleep(0.5)

    assert len(asyncio.run(_issue(address, tmp_path, tokens, pause))) == REQUESTS
    cluster.wait_until(
        lambda: not before & {pod["metadata"]["uid"] for pod in host.authorities()},
        seconds=60,
        what="every replica is new",
    )
    cluster.wait_for_rollout()
