"""Stores for the CA and for other secret state that several replicas of the authority share."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret, StoredSecrets
from csi_driver.host.atomic_write import replace_file

_MAX_BYTES = 1024 * 1024
_SERVING_PREFIX = "serving."
_ATTEMPTS = 10
"""Every lost attempt is a successful update by another replica, so ten in a row mean that something else is wrong."""
_T = TypeVar("_T")
Values = Mapping[str, Secret[bytes]]


class Store(Protocol):
    """Stores named secret values with optimistic concurrency."""

    @property
    def name(self) -> str:
        """The name of the store in errors."""

    async def load(self) -> StoredSecrets:
        """Return the values, none if nothing is stored yet; raise CertmountError if they can't be read."""

    async def save(self, values: Values, based_on: StoredSecrets) -> bool:
        """Replace all values atomically; return False if the store changed after ``based_on`` was loaded."""


async def update(
    store: Store, step: Callable[[StoredSecrets], Awaitable[tuple[Values | None, _T]]], attempts: int = _ATTEMPTS
) -> _T:
    """Load the values, save the values that ``step`` returns, and return the result of ``step``.

    ``step`` runs again with the new values after another writer changed the store. If it returns None as the values,
    nothing is saved.
    Raises CertmountError IssuerUnavailable if all attempts conflict, or what the store or ``step`` raises.
    """
    for _ in range(attempts):
        stored = await store.load()
        values, result = await step(stored)
        if values is None or await store.save(values, stored):
            return result
    raise CertmountError(Reason.ISSUER_UNAVAILABLE, f"{store.name}: {attempts} updates conflicted with other writers")


class StorePart:
    """The values of a store whose names match; saving them keeps the other values."""

    def __init__(self, store: Store, matches: Callable[[str], bool]) -> None:
        self._store = store
        self._matches = matches
        self.name = store.name

    async def load(self) -> StoredSecrets:
        stored = await self._store.load()
        return StoredSecrets(
            {name: value for name, value in stored.values.items() if self._matches(name)}, stored.version
        )

    async def save(self, values: Values, based_on: StoredSecrets) -> bool:
        whole = await self._store.load()
        if whole.version != based_on.version:
            return False
        others = {name: value for name, value in whole.values.items() if not self._matches(name)}
        return await self._store.save({**others, **values}, whole)


def ca_part(store: Store) -> StorePart:
    """Return the part with the internal CA and the state of its rotation: all values except the serving root."""
    return StorePart(store, lambda name: not name.startswith(_SERVING_PREFIX))


def serving_part(store: Store) -> StorePart:
    """Return the part with the root of the authority's serving certificate: names that begin with ``serving.``."""
    return StorePart(store, lambda name: name.startswith(_SERVING_PREFIX))


class DirectoryStore:
    """Stores all values in one file, so that they change atomically, in a directory that only its owner can enter."""

    def __init__(self, directory: Path, file: str = "ca.json") -> None:
        self._directory = directory
        self._file = directory / file
        self.name = str(self._file)

    async def load(self) -> StoredSecrets:
        return await asyncio.to_thread(self._load)

    async def save(self, values: Values, based_on: StoredSecrets) -> bool:
        return await asyncio.to_thread(self._save, values, based_on)

    def _load(self) -> StoredSecrets:
        try:
            content = self._read()
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}") from None
        if content is None:
            return StoredSecrets({}, "")
        try:
            document = json.loads(content)
            values = {str(name): Secret(base64.b64decode(text, validate=True)) for name, text in document.items()}
        except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error):
            raise self._error("is damaged", "restore it from a backup, or remove it to create a new one") from None
        return StoredSecrets(values, _version(content))

    def _read(self) -> bytes | None:
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
                hint = "run chmod 600, and replace the key because others could read it"
                raise self._error("is accessible to users other than its owner", hint)
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise self._error(f"is longer than {_MAX_BYTES} bytes")
        return content

    def _save(self, values: Values, based_on: StoredSecrets) -> bool:
        document = {name: base64.b64encode(value.reveal()).decode("ascii") for name, value in values.items()}
        content = json.dumps(document, indent=1).encode("ascii")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                current = self._read()
                if ("" if current is None else _version(current)) != based_on.version:
                    return False
                replace_file(self._file, content, mode=0o600, owner_of=self._directory)
        except OSError as error:
            raise self._error(f"cannot be written: {error.strerror}") from None
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The kernel releases an flock when its holder dies; the existence of a lock file would outlive the holder.
        descriptor = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _error(self, problem: str, hint: str = "") -> CertmountError:
        return CertmountError(Reason.INVALID_CA, Fault(self.name, problem, hint))


def _version(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
