"""``python -m tests.bench.e2e``: measures what needs a real kubelet. ``tests/e2e/run bench`` runs it on a cluster with certmount.

As in :mod:`tests.bench`, a missed budget does not fail the run. The exit status is 1 only if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from tests.bench.table import Figure, print_table, spread
from tests.e2e import cluster, host
from tests.e2e.logs import LogCollector
from tests.e2e.pods import Pod, manifest
from tests.support.machine import cpu_s, describe, rss_mb

_NAMESPACE = "e2e-bench"
_AT_ONCE, _ROUNDS = 30, 3
_RESTARTED = 11
_READY_S = 180.0
_KINDS: Mapping[str, Mapping[str, str] | None] = {
    "empty": None,  # a tmpfs emptyDir shows the kubelet's own time for a volume
    "EC-P256": {},
    "RSA-3072": {"key-type": "RSA-3072"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="rounds of each kind of pod")
    rounds = parser.parse_args().rounds
    version = json.loads(cluster.kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    print(f"Machine: {describe()}; Kubernetes {version}")
    logs = LogCollector()
    try:
        cluster.create_namespace(_NAMESPACE)
        figures = [*_measure_starts(rounds), *_measure_kubelet_restart(logs)]
        cluster.kubectl("delete", "namespace", _NAMESPACE, seconds=120)
    except (cluster.KubectlError, AssertionError) as error:
        sys.exit(f"wrong result: {error}")
    finally:
        logs.close()
    print()
    print_table(figures)


def _measure_starts(rounds: int) -> list[Figure]:
    """Start pods with each kind of volume in alternation, so that other load on the machine affects all kinds."""
    seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    pid = host.process_of(host.driver())
    empty_mb, spent = rss_mb(pid), {}
    _start("warm-up", None)
    for number in range(rounds):
        for kind, attributes in _KINDS.items():
            before = cpu_s(pid)
            seconds[kind].append(_start(f"{kind.lower()}-{number}", attributes))
            spent[kind] = cpu_s(pid) - before
            print(f"{_AT_ONCE} pods, {kind}: {seconds[kind][-1]:.2f} s", flush=True)
    base = seconds["empty"]
    noise = max(base) - min(base)
    elliptic, rsa = (median(seconds[kind]) - median(base) for kind in ("EC-P256", "RSA-3072"))
    every = "; ".join(f"{kind} {spread(values, 2)} s" for kind, values in seconds.items())
    return [
        Figure(
            f"{_AT_ONCE} pods at once, EC-P256, beyond the same with an empty tmpfs volume",
            f"{elliptic:+.2f} s",
            f"within the noise ({noise:.2f} s here)",
            elliptic <= noise,
            "Pod Certificates 1.36.3: 0.4 s; cert-manager csi-driver: noise",
            f"from the first pod's creation until all are Ready; medians of {rounds} alternating rounds: {every}. The noise is the "
            f"spread of the rounds with an empty volume. The driver's CPU time in the last round: EC-P256 {spent['EC-P256']:.2f} s, "
            f"RSA-3072 {spent['RSA-3072']:.2f} s",
        ),
        Figure(
            f"{_AT_ONCE} pods at once, RSA-3072, beyond the same with an empty tmpfs volume",
            f"{rsa:+.2f} s",
            "3 s",
            rsa < 3,
            "Pod Certificates 1.36.3: 16 s; cert-manager csi-driver: 3.5 s",
        ),
        Figure(
            f"RSS of the driver's container at first / after {_AT_ONCE * rounds * 2 + _AT_ONCE} pods",
            f"{empty_mb:.1f} / {rss_mb(pid):.1f} MB",
            method="VmRSS in 10^6 bytes, with the Python of the image",
        ),
    ]


def _start(name: str, attributes: Mapping[str, str] | None) -> float:
    """Return the seconds until a group of pods is Ready; delete the pods."""
    pods = [_pod(f"{name}-{number}", name, attributes) for number in range(_AT_ONCE)]
    started = time.perf_counter()
    _create(*pods)
    cluster.wait_for("Ready", "pod", "-l", f"group={name}", namespace=_NAMESPACE, seconds=_READY_S)
    seconds = time.perf_counter() - started
    cluster.kubectl("-n", _NAMESPACE, "delete", "pod", "-l", f"group={name}", "--grace-period=1", seconds=_READY_S)
    cluster.wait_until(lambda: not any(host.VOLUMES.glob("*")), seconds=60, what="the removal of their volumes")
    return seconds


def _measure_kubelet_restart(logs: LogCollector) -> list[Figure]:
    """Restart the kubelet, which republishes all volumes at once."""
    pods = [Pod(_NAMESPACE, f"restart-{number}") for number in range(_RESTARTED)]
    _create(*(_pod(pod.name, "restart", {}) for pod in pods))
    cluster.wait_for("Ready", "pod", "-l", "group=restart", namespace=_NAMESPACE, seconds=_READY_S)
    uids = [pod.uid for pod in pods]
    before = {uid: _files(uid) for uid in uids}
    driver = host.driver()
    calls = host.publish_calls(driver)
    host.restart_kubelet()
    cluster.wait_until(lambda: host.publish_calls(driver) >= calls + _RESTARTED, seconds=150, what="all republishes")
    other = sum(_files(uid) != before[uid] for uid in uids)
    issued = sum(len(logs.issued(uid)) for uid in uids) - _RESTARTED
    mounts = [len(host.mounts_at(host.target_path(uid))) for uid in uids]
    return [
        Figure(
            f"kubelet restart with {_RESTARTED} certificate pods",
            f"{issued} re-issued, {min(mounts)}-{max(mounts)} mounts a volume",
            "0 re-issued",
            issued == 0 and other == 0 and set(mounts) == {1},
            f"Pod Certificates: {_RESTARTED} of {_RESTARTED} re-issued, keys changed",
            "by the authority's audit log, the files' content and the host's mount table, after the kubelet has republished every "
            f"volume ({host.publish_calls(driver) - calls:.0f} calls)",
        )
    ]


def _pod(name: str, group: str, attributes: Mapping[str, str] | None) -> cluster.Manifest:
    pod: dict[str, Any] = dict(manifest(Pod(_NAMESPACE, name), attributes or {}, labels={"group": group}))
    if attributes is None:
        pod["spec"] = {**pod["spec"], "volumes": [{"name": "tls", "emptyDir": {"medium": "Memory"}}]}
    return pod


def _create(*pods: cluster.Manifest) -> None:
    cluster.kubectl("create", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": pods}))


def _files(uid: str) -> bytes:
    return (host.target_path(uid) / "site.pem").read_bytes()


if __name__ == "__main__":
    main()
