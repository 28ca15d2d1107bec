"""All that certmount has logged, also what came from containers and pods that are gone."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

_POLL_S = 0.1


class LogKeeper:
    """Holds the log files of certmount's containers open from when they appear: an open file outlives its deletion."""

    def __init__(self) -> None:
        self._folder = Path(os.environ["LOCALKUBE_RUN"]) / "pod-logs"
        self._files: dict[tuple[int, int], tuple[Path, BufferedReader]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="logs", daemon=True)
        self._look()
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for _, file in self._files.values():
            file.close()

    def text(self, component: str = "") -> str:
        """The whole text, as the container runtime wrote it; of ``certmount-node`` or ``certmount-authority`` only where asked."""
        return "".join(text for _, text in self._texts(component))

    def events(self, component: str = "") -> list[dict[str, Any]]:
        """The lines as certmount wrote them, by time, with the container's log file as ``file``; one of another form is an error."""
        events = [
            {**json.loads(line.split(" ", 3)[3]), "file": str(path)}
            for path, text in self._texts(component)
            for line in text.splitlines()
        ]
        return sorted(events, key=lambda event: str(event["timestamp"]))

    def issued(self, pod_uid: str) -> int:
        """How many certificates the authority's audit log tells of for a pod."""
        return sum(
            event.get("decision") == "issued" and event.get("pod_uid") == pod_uid
            for event in self.events("certmount-authority")
        )

    def _texts(self, component: str) -> Iterator[tuple[Path, str]]:
        self._look()
        for path, file in list(self._files.values()):
            if component in str(path):
                file.seek(0)
                yield path, file.read().decode()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._look()

    def _look(self) -> None:
        for path in self._folder.glob("certmount_*/*/*.log"):
            try:
                status = path.stat()
                key = (status.st_dev, status.st_ino)
                if key not in self._files:
                    self._files[key] = (path, path.open("rb"))
            except FileNotFoundError:
                continue
