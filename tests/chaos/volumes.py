"""Examines the volumes on the host: each running pod has one mount and valid files, and a deleted pod leaves nothing."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.e2e import host

_ROUND_S = 2.0
_REMOVAL_S = 120.0
_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----\n", re.DOTALL)


class VolumeMonitor:
    """Watches the volumes of running pods in a thread, and waits for the removal of those of deleted pods."""

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}  # by pod and fault, with the time of the first sight
        self.watched: dict[str, str] = {}  # pod by UID
        self.checks = 0
        self.expected: dict[str, float] = {}  # the time of deletion by UID, of pods with something left
        self.removed = 0
        self.slowest_removal_s = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="volumes")
        self.error = ""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def watch(self, pod: object, uid: str) -> None:
        with self._lock:
            self.watched[uid] = str(pod)

    def deleting(self, uid: str) -> None:
        """Call this before the deletion of a pod."""
        with self._lock:
            self.watched.pop(uid, None)

    def deleted(self, uid: str) -> None:
        """Call this after the API server has removed the pod."""
        with self._lock:
            self.expected[uid] = time.monotonic()

    def wait_for_removals(self) -> list[str]:
        """Wait until nothing is left of deleted pods; return what is left after the deadline."""
        deadline = time.monotonic() + _REMOVAL_S
        while self.expected and time.monotonic() < deadline:
            time.sleep(_ROUND_S)  # until the monitor has looked again
        return [left for uid in self.expected for left in _leftovers(uid)]

    def _run(self) -> None:
        try:
            while not self._stop.wait(_ROUND_S):
                self._round()
        except Exception as error:  # noqa: BLE001 - the command reports it and fails
            self.error = f"the volume monitor stopped: {error!r}"

    def _round(self) -> None:
        with self._lock:  # so that no pod is deleted during a check
            points = Counter(mount.point for mount in host.read_mounts())
            for uid, pod in self.watched.items():
                self.checks += 1
                if fault := _fault_of(uid, points):
                    self.lost.setdefault(f"{pod}: {fault}", datetime.now(UTC).isoformat(timespec="seconds"))
            for uid, since in list(self.expected.items()):
                if not _leftovers(uid):
                    del self.expected[uid]
                    self.removed += 1
                    self.slowest_removal_s = max(self.slowest_removal_s, time.monotonic() - since)


def _fault_of(uid: str, points: Counter[str]) -> str:
    """Return what is wrong with the volume of a running pod, or an empty text."""
    target = host.target_path(uid)
    if points[str(target)] != 1:
        return f"{points[str(target)]} mounts at the target path"
    try:
        bundle = (target / "site.pem").read_bytes()
        missing = [name for name in ("site.crt", "site.key", "root.crt") if not (target / name).stat().st_size]
    except OSError as error:
        return f"{type(error).__name__}: {Path(error.filename or '').name}"
    if missing:
        return f"{', '.join(missing)}: empty"
    try:
        leaf = x509.load_pem_x509_certificate(bundle)
        key = load_pem_private_key(b"".join(_KEY.findall(bundle)), None)
    except ValueError as error:
        return f"site.pem: {error}"
    if leaf.public_key() != key.public_key():
        return "site.pem: key and certificate do not match"
    now = datetime.now(UTC)
    if leaf.not_valid_after_utc <= now:
        return f"expired at {leaf.not_valid_after_utc:%H:%M:%S}"
    if leaf.not_valid_before_utc > now:
        return f"not valid before {leaf.not_valid_before_utc:%H:%M:%S}"
    return ""


def _leftovers(uid: str) -> list[str]:
    """Return the mounts, records and directories of a pod."""
    found = [mount.point for mount in host.read_mounts() if uid in mount.point]
    directory = host.KUBELET / "pods" / uid
    return [*found, *_records_of(uid), *([str(directory)] if os.path.lexists(directory) else [])]


def _records_of(uid: str) -> list[str]:
    found = []
    for record in host.VOLUMES.glob("*/record*"):
        try:
            if uid in record.read_text(encoding="utf-8"):
                found.append(str(record))
        except OSError:  # the driver has just removed it
            continue
    return found


def keys_on_disk() -> list[str]:
    """Return the volumes' directories and the files with a private key below the kubelet's directory, for a node without pods."""
    files = [Path(directory, name) for directory, _, names in os.walk(host.KUBELET) for name in names]
    small = [path for path in files if path.is_file() and path.stat().st_size < 1 << 20]
    keys = [path for path in small if b"PRIVATE KEY" in path.read_bytes()]
    return [str(path) for path in (*host.VOLUMES.iterdir(), *keys)]


def mounts_of_certmount() -> list[str]:
    mounts = [mount for mount in host.read_mounts() if mount.source == "certmount"]
    return [mount.point for mount in mounts if Path(mount.point).is_relative_to(host.KUBELET)]
