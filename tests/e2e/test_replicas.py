"""Replicas come and go under load, and no one who asks for a certificate notices."""

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

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.names import Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import CertificateSpec, KeyType
from csi_driver.node import authority_client
from csi_driver.node.authority_client import AuthorityClient
from tests.e2e import authority, host
from tests.e2e.kubectl import CERTMOUNT, apply, kubectl, make_namespace, roll_out, wait_for, wait_until
from tests.e2e.pods import Pod, manifest

NAMESPACE = "e2e-replicas"
PODS = [Pod(NAMESPACE, f"asking-{number}") for number in range(20)]
ISSUANCES = 500
SIDE_BY_SIDE = 10
SPEC = CertificateSpec(duration=timedelta(minutes=5))


@pytest.fixture(scope="module")
def tokens() -> list[Secret[str]]:
    """What the kubelet would give the driver for each of twenty pods."""
    make_namespace(NAMESPACE)
    apply(*(manifest(pod, {}) for pod in PODS))
    wait_for("Ready", "pod", "--all", namespace=NAMESPACE, seconds=90)
    with ThreadPoolExecutor(4) as side:
        return [
            Secret(token)
            for token in side.map(lambda pod: authority.token("default", NAMESPACE, pod.name, "certmount"), PODS)
        ]


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Service of the authority, for the node's own client. This machine does not ask the cluster's DNS."""
    options = (*authority_client._OPTIONS, ("grpc.ssl_target_name_override", authority.NAME))
    monkeypatch.setattr(authority_client, "_OPTIONS", options)
    driver = host.driver()["metadata"]["name"]
    (tmp_path / "authority.crt").write_bytes(authority.serving_root())
    (tmp_path / "token").write_text(authority.token("certmount-node", CERTMOUNT, driver, "certmount-node"))
    return authority.service_address()


async def _issue(
    address: str, folder: Path, tokens: list[Secret[str]], then: Callable[[int], Awaitable[None]]
) -> set[int]:
    """Has certificates issued side by side, telling ``then`` how many there are; gives their serial numbers. Raises what a call raises."""
    clients = [AuthorityClient(address, folder / "authority.crt", folder / "token") for _ in range(SIDE_BY_SIDE)]
    serials: set[int] = set()
    csr = build_csr(generate_key(KeyType.EC_P256), Names())

    async def ask(number: int) -> None:
        for turn in range(number, ISSUANCES, SIDE_BY_SIDE):
            answer = await clients[number].issue(csr, tokens[turn % len(tokens)], SPEC)
            serials.add(x509.load_der_x509_certificate(answer.chain[0]).serial_number)
            await then(len(serials))

    try:
        async with asyncio.TaskGroup() as asking:
            for number in range(SIDE_BY_SIDE):
                asking.create_task(ask(number))
    finally:
        for client in clients:
            await client.close()
    return serials


@pytest.mark.timeout(240)
def test_replica_is_killed_during_five_hundred_issuances(
    address: str, tmp_path: Path, tokens: list[Secret[str]]
) -> None:
    """One of two replicas dies without a word after a hundred certificates: not one of five hundred calls fails."""
    victim = host.process_of(host.pods_of("certmount-authority")[0])
    killed = ExitStack()
    killed.callback(os.kill, victim, signal.SIGKILL)

    async def then(count: int) -> None:
        if count >= 100:
            killed.close()

    assert len(asyncio.run(_issue(address, tmp_path, tokens, then))) == ISSUANCES
    roll_out("deployment/certmount-authority")


@pytest.mark.timeout(300)
def test_rolling_update_under_load(address: str, tmp_path: Path, tokens: list[Secret[str]]) -> None:
    """All replicas are replaced, one after the other, while certificates are issued: not one call fails."""
    before = {pod["metadata"]["uid"] for pod in host.pods_of("certmount-authority")}
    kubectl("-n", CERTMOUNT, "rollout", "restart", "deployment/certmount-authority")

    def replaced() -> bool:
        return not before & {pod["metadata"]["uid"] for pod in host.pods_of("certmount-authority")}

    async def pace(_count: int) -> None:
        # As spread as a rollout is long; the calls must be there whenever a replica goes.
        await asyncio.sleep(0.5)

    assert len(asyncio.run(_issue(address, tmp_path, tokens, pace))) == ISSUANCES
    wait_until(replaced, seconds=60, what="every replica is a new one")
    roll_out("deployment/certmount-authority")
