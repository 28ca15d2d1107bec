"""What happens all the time during the faults: pods start and are deleted, the CA rotates, and the policy changes."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.chaos.pairs import LIFETIME, NAMESPACE
from tests.chaos.volumes import VolumeMonitor
from tests.e2e import cluster
from tests.e2e.pods import TLS, Pod, manifest

_UNAVAILABLE = (cluster.KubectlError, subprocess.TimeoutExpired)  # expected while the API server or the authority is
_START_S = 120.0  # from the creation of a pod or the end of a fault
_ALIVE = 4  # pods of the churn that exist at the same time
_RETRY_S = 2.0


class Background(ABC):
    """Something that repeats in a thread until it is stopped. An unexpected exception is an ``error``."""

    period_s = _RETRY_S

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.error = ""
        self.unavailable = 0  # repetitions that failed because a component was unavailable
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.stopping.set()
        self._thread.join()

    @abstractmethod
    def step(self) -> None: ...

    def _run(self) -> None:
        while not self.stopping.wait(self.period_s):
            try:
                self.step()
            except _UNAVAILABLE:
                self.unavailable += 1
            except Exception as error:  # noqa: BLE001 - the command reports it and fails
                self.error = f"{type(self).__name__} stopped: {error!r}"
                return


class Churn(Background):
    """Creates and deletes pods. The first command of each pod requires its files."""

    def __init__(self, rng: random.Random, volumes: VolumeMonitor) -> None:
        super().__init__(rng)
        self.volumes = volumes
        self.created = 0
        self.not_started: list[str] = []
        self.undisturbed_since = time.monotonic()
        self.disturbed = False  # True during a fault
        self.alive: deque[tuple[Pod, str]] = deque()

    def step(self) -> None:
        if len(self.alive) >= _ALIVE:
            self._delete()
        pod = Pod(NAMESPACE, f"churn-{self.created}")
        self._create(pod)
        self.created += 1

    def _create(self, pod: Pod) -> None:
        check = f"for f in site.crt site.key root.crt; do [ -s {TLS}/$f ] || exit 1; done"
        command = ["/bin/sh", "-c", f"{check}; trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"]
        attributes = {"duration": LIFETIME, "key-type": self.rng.choice(("EC-P256", "EC-P256", "RSA-2048"))}
        cluster.apply(manifest(pod, attributes, command=command))
        begin = time.monotonic()
        uid = pod.uid
        while not self._is_ready(pod):
            patient = time.monotonic() - max(begin, self.undisturbed_since) < _START_S
            if self.stopping.is_set() or not (patient or self.disturbed):
                if not patient:
                    self.not_started.append(f"{pod}: not ready {time.monotonic() - begin:.0f} s after its creation")
                break
        else:
            self.volumes.watch(pod, uid)
        self.alive.append((pod, uid))

    def _is_ready(self, pod: Pod) -> bool:
        try:
            pod.wait_until_ready(5)
        except _UNAVAILABLE:
            return False
        return True

    def _delete(self) -> None:
        pod, uid = self.alive[0]
        self.volumes.deleting(uid)
        pod.delete("--ignore-not-found")
        self.volumes.deleted(uid)
        self.alive.popleft()


class Rotation(Background):
    """Rotates the CA again and again."""

    period_s = 10.0

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.phases: list[str] = []

    @property
    def completed(self) -> int:
        return max(self.phases.count("steady") - 1, 0)

    def step(self) -> None:
        phase = json.loads(_ca("status", "-o", "json"))["phase"]
        if not self.phases or phase != self.phases[-1]:
            self.phases.append(phase)
        if phase == "steady":
            _ca("rotate")


def _ca(*arguments: str) -> str:
    command = ("exec", "deploy/certmount-authority", "--", "/opt/certmount/bin/certmount", "ca", *arguments)
    return cluster.kubectl("-n", cluster.CERTMOUNT, *command)


class PolicyEditor(Background):
    """Changes the policy, also to one that does not parse. Each policy that parses allows the names of the pods."""

    period_s = 15.0

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.edits = self.rejected = 0
        self._lock = threading.Lock()
        self._names = {
            "match": {"namespaces": [NAMESPACE], "serviceAccounts": ["default"]},
            "allow": {"dns": ["*.{namespace}.svc"]},
        }

    def step(self) -> None:
        with self._lock:
            if self.rng.random() < 0.3:
                self._write("policy: [{match: ")
                self.rejected += 1
            else:
                rules = [self._other_rule() for _ in range(self.rng.randint(0, 20))]
                rules.insert(self.rng.randint(0, len(rules)), self._names)
                self._write(json.dumps({"policy": rules}))
            self.edits += 1

    @contextmanager
    def forbidden(self) -> Iterator[None]:
        """Forbid all names that need a rule."""
        with self._lock:
            self._write(json.dumps({"policy": []}))
            try:
                yield
            finally:
                self.allow()

    def allow(self) -> None:
        """Write a policy that allows the names of the pods."""
        self._write(json.dumps({"policy": [self._names]}))

    def _other_rule(self) -> dict[str, Any]:
        name = f"team-{self.rng.randint(0, 999)}"
        return {"match": {"namespaces": [name], "serviceAccounts": ["*"]}, "allow": {"dns": [f"{name}.example.com"]}}

    def _write(self, text: str) -> None:
        cluster.patch_config_map("certmount-policy", {"policy.yaml": text})
