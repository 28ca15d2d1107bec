"""A process that sends many publish calls of one namespace at once, each on its own connection like the kubelet."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

import grpc

from tests.support.kubelet import FakePod, Kubelet, node_stub

ATTRIBUTES = {
    "valid volumes": {},
    "invalid volumes": {"nonsense": "x"},
    "large invalid volumes": {f"attribute-{number}": "x" * 900 for number in range(60)},
}


async def flood(kubelet: Kubelet, kind: str, calls: int) -> Counter[str]:
    """Return the number of calls by status."""
    pods = [FakePod(namespace="attacker", name=f"pod-{number}", service_account="flood") for number in range(50)]
    requests = [
        kubelet.publish_request(pods[number % 50], ATTRIBUTES[kind], volume_id=f"csi-flood-{number}")
        for number in range(calls)
    ]
    statuses: Counter[str] = Counter()

    async def call(number: int) -> None:
        async with kubelet.channel() as channel:
            try:
                await node_stub(channel).NodePublishVolume(requests[number], timeout=60, wait_for_ready=True)
                statuses["OK"] += 1
            except grpc.aio.AioRpcError as error:
                statuses[error.code().name] += 1

    print("started", flush=True)
    await asyncio.gather(*map(call, range(calls)))
    return statuses


if __name__ == "__main__":
    print(dict(asyncio.run(flood(Kubelet(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])))))
