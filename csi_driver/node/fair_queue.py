"""A queue that tenants share. Pure: waiting is the caller's."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from csi_driver.node.pods import Pod


class Queued(Protocol):
    """An item of the queue. Among the items of a pod, lower values of ``urgency`` come first."""

    @property
    def pod(self) -> Pod: ...

    @property
    def urgency(self) -> float: ...


Item = TypeVar("Item", bound=Queued)


def _any(_namespace: str) -> bool:
    return True


class FairQueue(Generic[Item]):
    """Items that wait or are in progress.

    The next item comes from the namespace with the fewest items in progress; among several, from the one that was served
    the longest time ago. Within a namespace, the n-th item of a pod comes after the (n-1)-th items of all other pods.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[int, float, int, Item]]] = {}  # a heap for each namespace
        self._of_pod: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self._served: dict[str, int] = {}
        self._number = 0

    def __len__(self) -> int:
        """Return the number of items that wait or are in progress."""
        return self._of_pod.total()

    def count(self, namespace: str) -> int:
        """Return the number of items of a namespace that wait or are in progress."""
        return len(self._waiting.get(namespace, ())) + self._running[namespace]

    def add(self, item: Item) -> None:
        self._number += 1
        entry = self._of_pod[item.pod.uid], item.urgency, self._number, item
        heapq.heappush(self._waiting.setdefault(item.pod.namespace, []), entry)
        self._of_pod[item.pod.uid] += 1

    def next(self, may_start: Callable[[str], bool] = _any) -> Item | None:
        """Return the item to start next, or None if no item waits. ``may_start`` selects namespaces."""
        namespace = self._next_namespace(may_start)
        return None if namespace is None else self._waiting[namespace][0][3]

    def start_next(self, may_start: Callable[[str], bool] = _any) -> Item:
        """Start the item that :meth:`next` returns."""
        namespace = self._next_namespace(may_start)
        if namespace is None:
            raise IndexError("no item waits")
        item = heapq.heappop(self._waiting[namespace])[3]
        self._number += 1
        self._served[namespace] = self._number
        self._running[namespace] += 1
        self._drop_if_empty(namespace)
        return item

    def end(self, item: Item, *, started: bool) -> None:
        """Remove an item that has ended, or that was cancelled while it waited."""
        namespace = item.pod.namespace
        if started:
            self._running[namespace] -= 1
        else:
            heap = self._waiting[namespace]
            heap[:] = [entry for entry in heap if entry[3] is not item]
            heapq.heapify(heap)
        self._of_pod[item.pod.uid] -= 1
        if not self._of_pod[item.pod.uid]:
            del self._of_pod[item.pod.uid]
        self._drop_if_empty(namespace)

    def waiting(self) -> list[Item]:
        """Return all items that wait. Other threads can call this method too, so it iterates over copies."""
        return [entry[3] for heap in self._waiting.copy().values() for entry in heap.copy()]

    def _next_namespace(self, may_start: Callable[[str], bool]) -> str | None:
        def order(namespace: str) -> tuple[int, int, float, int]:
            _, urgency, number, _ = self._waiting[namespace][0]
            return self._running[namespace], self._served.get(namespace, 0), urgency, number

        return min(filter(may_start, self._waiting), key=order, default=None)

    def _drop_if_empty(self, namespace: str) -> None:
        if not self._waiting.get(namespace):
            self._waiting.pop(namespace, None)
            if not self._running[namespace]:
                self._running.pop(namespace, None)
                self._served.pop(namespace, None)
