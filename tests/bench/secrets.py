"""``python -m tests.bench.secrets [COUNT]``: Secrets of the Secrets controller. ``tests/e2e/run bench-secrets`` runs it on a cluster."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench.table import Figure, print_table
from tests.e2e import cluster, host, secrets
from tests.support.machine import cpu_s, describe, rss_mb

NAMESPACES = [f"e2e-secrets-bench-{number}" for number in range(10)]
COUNT = 1000
_GROUP = 100  # Ingresses in a request of kubectl
ACCOUNT = "system:serviceaccount:certmount:certmount-secrets"
_REST_S = 60.0
_WAIT_S = 120.0


class AuditLog:
    """The requests of a client in the API server's audit log; its lines are complete some milliseconds after the response."""

    def __init__(self, is_client: Callable[[Any], bool]) -> None:
        self._file = (Path(os.environ["LOCALKUBE_RUN"]) / "log" / "audit.log").open(encoding="utf-8")
        self._is_client = is_client
        self.skip()

    def skip(self) -> None:
        """Ignore all requests until now."""
        self._file.seek(0, os.SEEK_END)

    def requests(self) -> Counter[str]:
        """Return the requests since the last call by verb and resource."""
        return Counter(self._requests())

    def _requests(self) -> Iterator[str]:
        for line in self._file:
            entry = json.loads(line)
            if self._is_client(entry):
                target = entry.get("objectRef") or {}
                yield f"{entry['verb']} {target.get('resource', entry['requestURI'].partition('?')[0])}"


def text_of(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.most_common(8)) or "none"


def ingresses(count: int, issuer: str = "internal") -> Sequence[Any]:
    found = []
    for number in range(count):
        name, namespace = f"site-{number}", NAMESPACES[number % len(NAMESPACES)]
        found.append(secrets.ingress(name, namespace, {name: [f"{name}.{namespace}.example.com"]}, issuer=issuer))
    return found


def create(objects: Sequence[Any]) -> None:
    """Create the objects in groups, as kubectl does."""
    for begin in range(0, len(objects), _GROUP):
        items = {"apiVersion": "v1", "kind": "List", "items": objects[begin : begin + _GROUP]}
        cluster.kubectl("create", "-f", "-", text=json.dumps(items), seconds=120)


def count_secrets() -> int:
    """Return the number of TLS Secrets that exist, from the names alone."""
    names = ("get", "secrets", "-A", "--field-selector", "type=kubernetes.io/tls", "-o", "name")
    return len(cluster.kubectl(*names, seconds=120).split())


def rest(log: AuditLog, seconds: float = _REST_S) -> Counter[str]:
    """Return the requests of a period in which nothing changes."""
    log.skip()
    time.sleep(seconds)  # the period is what is measured
    return log.requests()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=COUNT, help=f"default: {COUNT}")
    count = parser.parse_args().count
    version = json.loads(cluster.kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    print(f"Machine: {describe()}; Kubernetes {version}")
    try:
        _install()
        print_table(_measure(count))
    except (cluster.KubectlError, AssertionError) as error:
        sys.exit(f"wrong result: {error}")


def _install() -> None:
    with tempfile.TemporaryDirectory() as directory:
        secrets.install(Path(directory))
    for namespace in NAMESPACES:
        cluster.create_namespace(namespace)
        role = str(secrets.DEPLOY / "components" / "secrets-namespace")
        cluster.kubectl("-n", namespace, "apply", "-k", role)
    variables = (f"CERTMOUNT_SECRETS_NAMESPACES={' '.join(NAMESPACES)}", "CERTMOUNT_SECRETS_LISTS-")
    cluster.kubectl("-n", cluster.CERTMOUNT, "set", "env", f"deployment/{secrets.DEPLOYMENT}", *variables)
    cluster.wait_for_rollout(f"deployment/{secrets.DEPLOYMENT}")


def _ready(total: int) -> bool:
    return host.metric(secrets.leader(), 'certmount_secrets_certificates{state="ready"}') >= total


def _all_events_written(leader: Any) -> Callable[[], bool]:
    """Return a function that is True if no event was written since its last call: of very many, some are dropped."""
    before = -1.0

    def settled() -> bool:
        nonlocal before
        former, before = before, host.metric(leader, "certmount_secrets_events_written_total")
        return before == former

    return settled


def _measure(total: int) -> list[Figure]:
    # A restart and the events of many Secrets take longer.
    longest_s = _WAIT_S + total / 10
    log = AuditLog(lambda entry: entry["user"]["username"] == ACCOUNT)
    leader = secrets.leader()
    pid = host.process_of(leader)
    empty_mb, spent = rss_mb(pid), cpu_s(pid)
    begin = time.monotonic()
    create(ingresses(total))
    cluster.wait_until(lambda: count_secrets() >= total, seconds=longest_s, what=f"{total} Secrets", pause=1)
    cluster.wait_until(lambda: _ready(total), seconds=longest_s, what="ready certificates")
    issued_s, issued_cpu, requests = time.monotonic() - begin, cpu_s(pid) - spent, log.requests()
    cluster.wait_until(_all_events_written(leader), seconds=longest_s, what="the end of the events", pause=3)
    full_mb, before_rest = rss_mb(pid), cpu_s(pid)
    at_rest = rest(log)
    rest_cpu = cpu_s(pid) - before_rest
    standby_mb = [rss_mb(host.process_of(pod)) for pod in secrets.replicas() if pod["metadata"] != leader["metadata"]]

    log.skip()
    issued = host.metric(leader, "certmount_secrets_issued_total")
    begin = time.monotonic()
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "pod", leader["metadata"]["name"])
    cluster.wait_until(lambda: _ready(total), seconds=longest_s, what="ready certificates after a restart")
    restart_s, restart = time.monotonic() - begin, log.requests()
    successor = secrets.leader()
    again = host.metric(successor, "certmount_secrets_issued_total")
    return [
        Figure(
            f"{total} Ingresses, until all have a Secret",
            f"{issued_s:.0f} s, {issued_cpu:.1f} s of CPU time",
            method=f"from the first Ingress, created by kubectl, EC-P256, internal CA; {issued:.0f} certificates; requests: {text_of(requests)}",
        ),
        Figure(
            f"RSS of the controller with 0 / {total} Secrets; of the other replica",
            f"{empty_mb:.0f} / {full_mb:.0f} MB; {', '.join(f'{one:.0f}' for one in standby_mb)} MB",
            method="VmRSS in 10^6 bytes",
        ),
        Figure(
            f"API requests in {_REST_S:.0f} s at rest, both replicas",
            f"{at_rest.total()}, {rest_cpu * 1000 / _REST_S:.1f} ms of CPU time per second",
            method=f"from the audit log: {text_of(at_rest)}",
        ),
        Figure(
            "restart of the active replica, until the other one knows all certificates",
            f"{restart_s:.1f} s, {restart.total()} API requests, {again:.0f} issued",
            "0 issued",
            again == 0,
            method=f"from the deletion of the pod; requests: {text_of(restart)}",
        ),
    ]


if __name__ == "__main__":
    main()
