"""Collects all log lines of certmount, including those of deleted containers and pods."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

AUTHORITY, DRIVER, SECRETS = "certmount-authority", "certmount-node", "certmount-secrets"
_POLL_INTERVAL_S = 0.1


class LogCollector:
    """Opens each log file of certmount's containers when it appears: an open file remains readable after its deletion."""

    def __init__(self) -> None:
        self._directory = Path(os.environ["LOCALKUBE_RUN"]) / "pod-logs"
        self._files: dict[tuple[int, int], tuple[Path, BufferedReader]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="logs", daemon=True)
        self._open_new_files()
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for _, file in self._files.values():
            file.close()

    def text(self, component: str = "") -> str:
        """Return the text that the container runtime wrote, of one component or of all."""
        return "".join(text for _, text in self._texts(component))

    def events(self, component: str = "") -> list[dict[str, Any]]:
        """Return the log lines by time, each with its log file as ``file``. Fails for a line that is not JSON."""
        events = [
            {**json.loads(line.split(" ", 3)[3]), "file": str(path)}
            for path, text in self._texts(component)
            for line in text.splitlines()
        ]
        return sorted(events, key=lambda event: str(event["timestamp"]))

    def issued(self, pod_uid: str | None = None) -> list[dict[str, Any]]:
        """Return the audit log lines of issued certificates, of one pod or of all."""
        events = [event for event in self.events(AUTHORITY) if event.get("decision") == "issued"]
        return [event for event in events if pod_uid is None or event.get("pod_uid") == pod_uid]

    def _texts(self, component: str) -> Iterator[tuple[Path, str]]:
        self._open_new_files()
        for path, file in list(self._files.values()):
            if component in str(path):
                file.seek(0)
                yield path, file.read().decode()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_INTERVAL_S):
            self._open_new_files()

    def _paths(self) -> list[Path]:
        while True:
            with contextlib.suppress(FileNotFoundError):  # the kubelet deleted a directory meanwhile
                return list(self._directory.glob("certmount_*/*/*.log"))

    def _open_new_files(self) -> None:
        for path in self._paths():
            try:
                status = path.stat()
                key = (status.st_dev, status.st_ino)
                if key not in self._files:
                    self._files[key] = (path, path.open("rb"))
            except FileNotFoundError:
                continue
