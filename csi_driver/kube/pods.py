"""Which labels a pod has, for every pod of the cluster: as few bytes for each as can be."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from csi_driver.kube.awaited import Arrivals
from csi_driver.kube.metadata import Json, Pairs, read_metadata

_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.ASCII)


@dataclass(slots=True, eq=False)
class LabelledPods:
    """What the pods of one namespace with the very same labels have in common; a workload's replicas share one."""

    namespace: str
    labels: Pairs
    pods: int = 0
    """How many there are; without any it is forgotten."""


class Pods:
    """By uid, as a pod made anew under its old name is another pod."""

    def __init__(self) -> None:
        self._pods: dict[Hashable, LabelledPods] = {}
        self._shared: dict[tuple[str, Pairs], LabelledPods] = {}
        self._arrivals = Arrivals()

    def __len__(self) -> int:
        return len(self._pods)

    def find(self, uid: str) -> LabelledPods | None:
        return self._pods.get(_key(uid))

    async def wait(self, uid: str, seconds: float) -> LabelledPods | None:
        """The pod's labels, as soon as they are known; None when that takes longer."""
        return await self._arrivals.wait(_key(uid), lambda: self.find(uid), seconds)

    def put(self, item: Json) -> Hashable:
        pod = read_metadata(item)
        key = _key(pod.uid)
        before = self._pods.get(key)
        if before is None or (before.namespace, before.labels) != (pod.namespace, pod.labels):
            shared = self._shared.get((pod.namespace, pod.labels))
            if shared is None:
                labels = tuple((sys.intern(name), sys.intern(value)) for name, value in pod.labels)
                shared = LabelledPods(sys.intern(pod.namespace), labels)
                self._shared[shared.namespace, labels] = shared
            shared.pods += 1
            self._pods[key] = shared
            if before is None:
                self._arrivals.came(key)
            else:
                self._leave(before)
        return key

    def remove(self, item: Json) -> None:
        self._drop(_key(read_metadata(item).uid))

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        for key in [key for key in self._pods if key not in keys]:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        shared = self._pods.pop(key, None)
        if shared is not None:
            self._leave(shared)

    def _leave(self, shared: LabelledPods) -> None:
        shared.pods -= 1
        if not shared.pods:
            del self._shared[shared.namespace, shared.labels]


def _key(uid: str) -> Hashable:
    """A UUID as a number takes a third of its text; what is none stays as it is."""
    return int(uid.replace("-", ""), 16) if _UUID.fullmatch(uid) else uid
