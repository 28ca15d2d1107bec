"""Pairs of pods that talk mutual TLS all the time, and what their failed handshakes mean."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e import cluster, host
from tests.e2e.pods import Pod, manifest, service, with_script

NAMESPACE = "e2e-chaos"
LIFETIME = "5m"
RATE_HZ = 3
_READY_S = 180
_SETTLED_S = 10.0  # after a new pod is ready, its Service still sends connections to the old address for a moment


class Failure(NamedTuple):
    """A failed handshake. ``cause`` is empty if it is certmount's, or says what else failed."""

    time: float
    pair: str
    text: str
    cause: str


@dataclass
class Pair:
    """A client, a server, and the times when one of them was replaced."""

    number: int
    replaced: list[list[float]] = field(default_factory=list)  # begin and end in unix seconds

    @property
    def client(self) -> Pod:
        return Pod(NAMESPACE, f"client-{self.number}")

    @property
    def server(self) -> Pod:
        return Pod(NAMESPACE, f"server-{self.number}")

    def manifests(self, pod: Pod) -> tuple[Any, ...]:
        """Return the manifests of one of the two pods. The server's name is that of its Service, the client's needs a policy rule."""
        name = f"{pod.name}.{NAMESPACE}.svc"
        base = manifest(pod, {"duration": LIFETIME, "name": name}, labels={"app": pod.name})
        if pod == self.client:
            return with_script(base, "client.py", f"{self.server.name}.{NAMESPACE}.svc", str(RATE_HZ))
        return service(pod.name, NAMESPACE), *with_script(base, "server.py")

    def was_replaced_at(self, moment: float) -> bool:
        return any(begin - 1 <= moment <= end + _SETTLED_S for begin, end in self.replaced)


class Log:
    """The log file of a pod on this host. An open file remains readable after the pod's deletion."""

    def __init__(self, pod: Pod, uid: str) -> None:
        directory = Path(os.environ["LOCALKUBE_RUN"]) / "pod-logs" / f"{pod.namespace}_{pod.name}_{uid}"
        self.path = directory / "app" / "0.log"
        self.file: BufferedReader = self.path.open("rb")
        self._partial = b""

    def lines(self) -> Iterator[str]:
        """Yield the new lines without the runtime's prefix. Continues in the new file after the kubelet has rotated the log."""
        while chunk := self.file.read():
            *complete, self._partial = (self._partial + chunk).split(b"\n")
            yield from (line.decode().split(" ", 3)[3] for line in complete)
        if self.path.exists() and self.path.stat().st_ino != os.fstat(self.file.fileno()).st_ino:
            self.file.close()
            self.file = self.path.open("rb")


class Pairs:
    """All pairs with their counts."""

    def __init__(self, count: int) -> None:
        self.pairs = [Pair(number) for number in range(count)]
        self.uids: dict[Pod, str] = {}
        self.failures: list[Failure] = []
        self.last: dict[int, dict[str, Any]] = {}  # the last status of each client
        self._logs: dict[int, Log] = {}
        self._earlier: Counter[str] = Counter()  # of clients that were replaced
        self.last_success: dict[int, float] = {}

    def start(self) -> None:
        cluster.apply(
            *(one for pair in self.pairs for pod in (pair.client, pair.server) for one in pair.manifests(pod))
        )
        for pair in self.pairs:
            for pod in (pair.client, pair.server):
                pod.wait_until_ready(_READY_S)
                self._started(pair, pod)

    def replace(self, pair: Pair, pod: Pod) -> None:
        """Delete a pod, and create it again."""
        window = [time.time(), float("inf")]
        pair.replaced.append(window)
        pod.delete()
        self.uids.pop(pod)
        if pod == pair.client:
            self.read()
            self._earlier += _counts(self.last.pop(pair.number, {}))
        cluster.apply(*pair.manifests(pod))
        pod.wait_until_ready(_READY_S)
        self._started(pair, pod)
        window[1] = time.time()

    def _started(self, pair: Pair, pod: Pod) -> None:
        self.uids[pod] = pod.uid
        if pod == pair.client:
            self._logs[pair.number] = Log(pod, pod.uid)

    def read(self) -> None:
        """Read what the clients have printed."""
        for pair in self.pairs:
            if pair.number not in self._logs:
                continue
            for line in self._logs[pair.number].lines():
                value = json.loads(line)
                if "failure" in value:
                    self.failures.append(self._classify(pair, value["failure"]))
                else:
                    before = self.last.get(pair.number, {"connections": 0, "failures": 0})
                    if value["connections"] - value["failures"] > before["connections"] - before["failures"]:
                        self.last_success[pair.number] = time.monotonic()
                    self.last[pair.number] = value

    def _classify(self, pair: Pair, failure: dict[str, Any]) -> Failure:
        """Only a failure of the files or of TLS is certmount's, and a connection that ends early without a reason."""
        cause, kind = "", failure["class"]
        if pair.was_replaced_at(failure["time"]):
            cause = "the peer was replaced"
        elif failure["phase"] == "connect":
            cause = "no TCP connection"
        elif failure["phase"] == "handshake" and kind in {"TimeoutError", "timeout"}:
            cause = "the peer was slow"
        text = f"{failure['phase']}: {kind}: {failure['error']}"
        return Failure(failure["time"], f"pair {pair.number}", text, cause)

    def totals(self) -> Counter[str]:
        """Return the connections, failures and renewals of all clients."""
        total = Counter(self._earlier)
        for status in self.last.values():
            total += _counts(status)
        return total

    def all_succeeded_since(self, moment: float) -> bool:
        """Return True if each pair has connected since this monotonic time."""
        self.read()
        return all(self.last_success.get(pair.number, 0.0) > moment for pair in self.pairs)


def _counts(status: dict[str, Any]) -> Counter[str]:
    return Counter({name: status.get(name, 0) for name in ("connections", "failures", "renewals")})


def restarts() -> dict[str, int]:
    """Return the restarts of each container of certmount, by component and pod."""
    return {
        f"{component}/{pod['metadata']['name']}": host.restarts(pod)
        for component in ("certmount-node", "certmount-authority")
        for pod in host.pods_of(component)
    }
