"""Where the CA is kept, and how two replicas that start at once come to share one."""

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored_secrets import StoredSecrets

_MAX_BYTES = 1024 * 1024
_SERVING = "serving."


class Store(Protocol):
    """Keeps named secret values with optimistic concurrency."""

    @property
    def name(self) -> str:
        """What errors call it."""

    async def load(self) -> StoredSecrets:
        """The values, none where nothing was saved yet; raises CertmountError where they can't be read."""

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        """Replaces what ``based_on`` was loaded from, all at once; False when another writer came first."""


class Part:
    """Some of a store's values, by their names, as a store of their own: saving them leaves the others as they are."""

    def __init__(self, store: Store, owns: Callable[[str], bool]) -> None:
        self._store = store
        self._owns = owns
        self.name = store.name

    async def load(self) -> StoredSecrets:
        stored = await self._store.load()
        return StoredSecrets({name: value for name, value in stored.values.items() if self._owns(name)}, stored.version)

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        whole = await self._store.load()
        if whole.version != based_on.version:
            return False
        others = {name: value for name, value in whole.values.items() if not self._owns(name)}
        return await self._store.save({**others, **values}, whole)


def ca_part(store: Store) -> Part:
    """The pods' CA and the state of its rotation: all that is not the serving root's."""
    return Part(store, lambda name: not name.startswith(_SERVING))


def serving_part(store: Store) -> Part:
    """The root of the authority's own certificate: the values whose names begin with ``serving.``."""
    return Part(store, lambda name: name.startswith(_SERVING))


class FolderStore:
    """One file in a folder that only its owner may enter; one file, so that it changes at once and wholly."""

    def __init__(self, folder: Path, file: str = "ca.json") -> None:
        self._folder = folder
        self._file = folder / file
        self.name = str(self._file)

    async def load(self) -> StoredSecrets:
        return await asyncio.to_thread(self._load)

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        return await asyncio.to_thread(self._save, values, based_on)

    def _load(self) -> StoredSecrets:
        try:
            content = self._read()
        except OSError as error:
            raise self._unusable(f"cannot be read: {error.strerror}") from None
        if content is None:
            return StoredSecrets({}, "")
        try:
            document = json.loads(content)
            values = {str(name): Secret(base64.b64decode(text, validate=True)) for name, text in document.items()}
        except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error):
            raise self._unusable("is damaged", "restore it, or remove it to have a new one made") from None
        return StoredSecrets(values, _version(content))

    def _read(self) -> bytes | None:
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
                raise self._unusable("can be read by others than its owner", "chmod 600, and consider the key known")
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise self._unusable(f"is longer than {_MAX_BYTES} bytes")
        return content

    def _save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        document = {name: base64.b64encode(value.reveal()).decode("ascii") for name, value in values.items()}
        content = json.dumps(document, indent=1).encode("ascii")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                current = self._read()
                if ("" if current is None else _version(current)) != based_on.version:
                    return False
                replace_file(self._file, content, mode=0o600, owner_of=self._folder)
        except OSError as error:
            raise self._unusable(f"cannot be written: {error.strerror}") from None
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # flock and not a lock file's existence: the kernel lets go of it when its holder dies.
        descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _unusable(self, problem: str, hint: str = "") -> CertmountError:
        return CertmountError(Reason.INVALID_CA, Fault(self.name, problem, hint))


def replace_file(file: Path, content: bytes, *, mode: int, owner_of: Path | None = None) -> None:
    """Writes a file so that it is there wholly or not at all, also after a power cut; raises OSError.

    Root gives it to the owner of ``owner_of``: a command that an administrator calls must not lock out who serves.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(descriptor, mode)
            if owner_of is not None and os.geteuid() == 0:
                owner = owner_of.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _version(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
