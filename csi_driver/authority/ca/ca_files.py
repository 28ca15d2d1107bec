"""A CA in files that someone else creates and renews, for example a mounted Secret, cert-manager or Vault Agent.

certmount writes nothing there, so it can't renew the intermediate. It doesn't read ``root.key``, because it needs no
root key to sign leaf certificates.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import structlog

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.keyring import INTERMEDIATE, INTERMEDIATE_KEY, ROOT
from csi_driver.authority.ca.keyring_loader import load_keyring
from csi_driver.authority.ca.rotation import RotationPhase, RotationState
from csi_driver.authority.ca.state import CAState
from csi_driver.authority.config.watched_file import Contents, WatchedFile, read_directory, read_file
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_FILES = (ROOT, INTERMEDIATE, INTERMEDIATE_KEY)
_PASSWORD = "password"  # a name, not a password
_HINT = "fix the files, or the tool that writes them"
_MAX_BYTES = 1024 * 1024
_UNLIMITED = 2**53


class CAFiles:
    """The CA in the files ``root.crt``, ``intermediate.crt`` and ``intermediate.key`` of a directory: a ``CASource``.

    It has no rotation: the owner of the files decides which CA signs and which roots are trusted. If new files are
    invalid, the previous CA stays in use.
    """

    unacknowledged = 0  # there is no rotation

    def __init__(self, directory: Path, metrics: AuthorityMetrics, password_file: Path | None = None) -> None:
        self.name = str(directory)
        self._directory = directory
        self._password_file = password_file
        self._now = datetime.min.replace(tzinfo=UTC)
        self._watched: WatchedFile[CAState] = WatchedFile(
            "CA",
            self._read_files,
            self._parse,
            on_change=self._log_change,
            on_rejected=metrics.ca_refresh_failures.inc,
            valid_later=True,
        )

    @property
    def valid(self) -> bool:
        return self._watched.valid

    async def refresh(self, now: datetime, steady: datetime | None = None) -> CAState:  # noqa: ARG002  # for rotations
        """Return the CA of the newest valid files.

        Raises CertmountError InvalidCA, with all faults, if no files have been valid yet.
        """
        self._now = now
        return await self._watched.refresh()

    async def read(self, now: datetime) -> CAState:
        return await self.refresh(now)

    async def record_lifetime(self, now: datetime, seconds: float) -> CAState:  # noqa: ARG002  # nothing is recorded
        return await self.refresh(now)

    def _read_files(self) -> Contents:
        contents = dict(read_directory(self._directory, _FILES.__contains__, _MAX_BYTES, Reason.INVALID_CA, _HINT))
        if self._password_file is not None:
            contents[_PASSWORD] = read_file(self._password_file, _MAX_BYTES, Reason.INVALID_CA, _HINT)
        return contents

    def _parse(self, contents: Contents) -> CAState:
        for name, content in contents.items():
            if len(content) > _MAX_BYTES:
                raise CertmountError(Reason.INVALID_CA, Fault(name, f"is longer than {_MAX_BYTES} bytes", _HINT))
        values = {name: Secret(contents[name]) for name in _FILES if name in contents}
        # Editors and echo append a line break.
        password = Secret(contents[_PASSWORD].rstrip(b"\r\n")) if _PASSWORD in contents else None
        keyring = load_keyring(values, self._now, where=self.name, password=password, hint=_HINT)
        previous, now = self._watched.value, int(self._now.timestamp())
        generation = previous.rotation.generation if previous else 0
        if previous is None or set(previous.keyring.roots_der) != set(keyring.roots_der):
            generation = rotation.next_generation(generation, now)
        state = RotationState(RotationPhase.STEADY, generation, since=now, max_lifetime=_UNLIMITED)
        return CAState(keyring, None, state)

    def _log_change(self, state: CAState) -> None:
        root, intermediate = state.keyring.root, state.keyring.intermediate.certificate
        log.info("CA files loaded", files=self.name, root=fingerprint(root), intermediate=fingerprint(intermediate))
