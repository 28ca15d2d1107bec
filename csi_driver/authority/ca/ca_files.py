"""A CA from files that others put there and renew: a Secret mounted into the pod, cert-manager, an agent of Vault.

Nothing is ever written there, so renewing the intermediate is left to who writes the files. For the same reason a
``root.key`` is not read: signing leaves doesn't need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import structlog

from csi_driver.authority.ca.keyring import INTERMEDIATE, INTERMEDIATE_KEY, ROOT, Keyring
from csi_driver.authority.ca.keyring_loader import load_keyring
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_NAMES = (ROOT, INTERMEDIATE, INTERMEDIATE_KEY)
_HINT = "whoever writes the files must put it right"
_MAX_BYTES = 1024 * 1024
_KUBELETS = "..data"
"""The link by which the kubelet changes all files of a mounted Secret at once."""
_MOST_SWAPS = 5


@dataclass(frozen=True, slots=True)
class _Content:
    values: Mapping[str, Secret[bytes]]
    password: Secret[bytes] | None
    digest: str


class CAFiles:
    """The folder of a CA: ``root.crt``, ``intermediate.crt`` and ``intermediate.key``.

    ``name`` is what errors call it. Call :meth:`refresh` every few seconds: what has not changed costs its reading only.
    """

    def __init__(self, folder: Path, metrics: AuthorityMetrics, password_file: Path | None = None) -> None:
        self.name = str(folder)
        self._folder = folder
        self._password_file = password_file
        self._metrics = metrics
        self._held: Keyring | None = None
        self._held_digest = ""
        self._refused = ""
        """What was said last of files that can't be used."""

    async def refresh(self, now: datetime) -> Keyring:
        """The keyring of the newest files that are good; what is wrong with newer ones is logged and counted once.

        Raises:
            CertmountError: InvalidCA, with every fault, where no files have been good yet.
        """
        try:
            content = await asyncio.to_thread(self._read)
            if self._held is not None and content.digest == self._held_digest:
                self._refused = ""
                return self._held
            keyring = load_keyring(content.values, now, where=self.name, password=content.password, hint=_HINT)
        except CertmountError as error:
            if self._held is None:
                raise
            # The same faults again are no news; files that are not valid yet become good while nobody touches them.
            if str(error) != self._refused:
                self._refused = str(error)
                self._metrics.ca_refresh_failures.inc()
                log.error("new CA files refused, the former CA stays in use", files=self.name, error=str(error))  # noqa: TRY400  # the text says all
            return self._held
        log.info(
            "CA files taken",
            files=self.name,
            root=fingerprint(keyring.root),
            intermediate=fingerprint(keyring.intermediate.certificate),
        )
        self._held, self._held_digest, self._refused = keyring, content.digest, ""
        return keyring

    def _read(self) -> _Content:
        try:
            values = self._snapshot()
            password = None if self._password_file is None else _password(self._password_file)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise CertmountError(Reason.INVALID_CA, Fault(str(error.filename or self.name), problem, _HINT)) from None
        return _Content(values, password, _digest({**values, "password": password or Secret(b"")}))

    def _snapshot(self) -> Mapping[str, Secret[bytes]]:
        """Values that belong together; raises OSError."""
        for _ in range(_MOST_SWAPS):
            with self._opened() as folder:
                values = {name: value for name in _NAMES if (value := _value(name, folder)) is not None}
                # The kubelet removes the former folder while it may be read here: then some files seem to be missing.
                with self._opened() as current:
                    if os.path.samestat(os.fstat(folder), os.fstat(current)):
                        return values
        raise CertmountError(Reason.INVALID_CA, Fault(self.name, "changes faster than it can be read", _HINT))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self._folder / _KUBELETS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _value(name: str, folder: int | None) -> Secret[bytes] | None:
    """The content of a file; None where there is none. Raises OSError."""
    try:
        # O_NONBLOCK, as opening a pipe would wait for its writer for ever.
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "is not a regular file", name)
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise OSError(0, f"is longer than {_MAX_BYTES} bytes", name)
    return Secret(content)


def _password(file: Path) -> Secret[bytes]:
    """Without the line end that editors and ``echo`` add."""
    value = _value(str(file), None)
    if value is None:
        raise FileNotFoundError(0, "there is no such file", str(file))
    return Secret(value.reveal().rstrip(b"\r\n"))


def _digest(values: Mapping[str, Secret[bytes]]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(f"{name} {len(value.reveal())} ".encode() + value.reveal())
    return digest.hexdigest()
