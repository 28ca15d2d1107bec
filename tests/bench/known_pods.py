"""Measures the authority's caches of pods and Services: ``python -m tests.bench.known_pods [PODS]``."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import timeit
import uuid
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from csi_driver.kube.metadata import ServiceSelector
from csi_driver.kube.object_caches import PodCache, ServiceCache
from csi_driver.kube.objects import read_metadata
from tests.bench.table import Figure, print_table
from tests.support.api_objects import encode
from tests.support.machine import rss_mb

_PODS = 500_000
_PAGE = 500
_REPLICAS = 10
_SERVICES = 1000
_CALLS = 20_000


def _pod(number: int, *, stateful: bool) -> dict[str, Any]:
    """Return a pod's metadata with managed fields: about 2.4 kB."""
    workload = f"app-{number // _REPLICAS}"
    name = f"{workload}-{number}"
    own = {"statefulset.kubernetes.io/pod-name": name} if stateful else {"pod-template-hash": f"{workload:0>10}"}
    fields: dict[str, Any] = {f"f:metadata{field}": {"f:labels": {".": {}, "f:app": {}}} for field in range(30)}
    metadata = {
        "name": name,
        "namespace": f"ns-{number // _REPLICAS % 500}",
        "uid": str(uuid.UUID(int=number)),
        "resourceVersion": str(number),
        "labels": {"app.kubernetes.io/name": workload, "app.kubernetes.io/part-of": "shop", **own},
        "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": workload, "uid": "x" * 36}],
        "managedFields": [json.dumps(fields).encode()],
    }
    return {"kind": "PartialObjectMetadata", "metadata": metadata}


@dataclass(frozen=True, slots=True)
class StoredPods:
    """A cache that contains pods, how its memory grew, and the CPU time for each pod."""

    pods: PodCache
    kept_mb: float
    peak_mb: float
    us: float


def store_pods(count: int, *, stateful: bool) -> StoredPods:
    pods, keys = PodCache(2**40), set[Hashable | None]()
    gc.collect()
    before, seconds = rss_mb(os.getpid()), 0.0
    for start in range(0, count, _PAGE):
        page = [encode(_pod(number, stateful=stateful)) for number in range(start, start + _PAGE)]
        begin = time.process_time()
        keys.update(pods.put(read_metadata(item)) for item in page)
        seconds += time.process_time() - begin
    pods.retain(keys)
    peak = rss_mb(os.getpid()) - before
    keys.clear()
    gc.collect()
    return StoredPods(pods, rss_mb(os.getpid()) - before, peak, seconds * 1e6 / count)


def _measure_pods(name: str, count: int, *, stateful: bool) -> Figure:
    stored = store_pods(count, stateful=stateful)
    return Figure(
        f"{count} pods {name}",
        f"{stored.kept_mb * 1e6 / count:.0f} bytes a pod: {stored.kept_mb:.0f} MB, {stored.peak_mb:.0f} MB while they are "
        f"listed; {stored.us:.0f} us a pod",
        method=f"growth of VmRSS in 10^6 bytes; CPU time to parse pages of {_PAGE} and to store them",
    )


def _measure_event() -> Figure:
    pods, data = PodCache(), encode(_pod(1, stateful=False))
    return Figure("an event of a watch", f"{_us(lambda: pods.put(read_metadata(data))):.0f} us")


def _measure_selection() -> Figure:
    services = ServiceCache()
    for number in range(_SERVICES):
        pairs = (("app", f"a-{number}"), ("part-of", "shop"))
        services.put(ServiceSelector("web", f"s-{number}", pairs))
    labels = (("app", "a-7"), ("hash", "x"), ("part-of", "shop"), ("version", "1"))
    selection_us = _us(lambda: services.select("web", labels))
    return Figure(f"Services of a pod, of {_SERVICES} in its namespace", f"{selection_us:.1f} us")


def _us(call: Callable[[], object]) -> float:
    return timeit.timeit(call, timer=time.process_time, number=_CALLS) / _CALLS * 1e6


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else _PODS
    print_table(
        [
            _measure_pods(f"of workloads with {_REPLICAS} replicas", count, stateful=False),
            _measure_pods("of StatefulSets, each with its own label", count, stateful=True),
            _measure_event(),
            _measure_selection(),
        ]
    )


if __name__ == "__main__":
    main()
