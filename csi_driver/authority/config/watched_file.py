"""Files that an administrator or the kubelet replaces while the authority runs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from csi_driver.authority.retry import run_periodically
from csi_driver.core.errors import CertmountError, Fault, Reason

log = structlog.get_logger(__name__)

_T = TypeVar("_T")
_KUBELET_LINK = "..data"
"""The symbolic link that the kubelet replaces to change all files of a mounted ConfigMap or Secret atomically."""
_READ_ATTEMPTS = 5
Contents = Mapping[str, bytes]  # file contents by name


class WatchedFile(Generic[_T]):
    """Provides a value parsed from files. If newer content is invalid, the previous value stays in force."""

    def __init__(
        self,
        what: str,
        read: Callable[[], Contents],
        parse: Callable[[Contents], _T],
        *,
        initial: _T | None = None,
        on_change: Callable[[_T], None] = lambda _value: None,
        on_rejected: Callable[[], None] = lambda: None,
        valid_later: bool = False,
    ) -> None:
        """``read`` and ``parse`` run in a thread and raise CertmountError; the callbacks run in the event loop.

        ``what`` is the noun in log events. Set ``valid_later`` if rejected content can become valid by itself, as
        certificates do at their notBefore time: it is then parsed at every call.
        """
        self.value = initial
        self._what = what
        self._read = read
        self._parse = parse
        self._on_change = on_change
        self._on_rejected = on_rejected
        self._valid_later = valid_later
        self._digest = ""
        self._rejected: tuple[str, str] | None = None
        """Digest and error of the newest content if it is invalid."""

    @property
    def valid(self) -> bool:
        """True if the value is that of the newest content."""
        return self.value is not None and self._rejected is None

    async def load(self) -> _T:
        """Read the files, parse them if their content changed, and return the value.

        Raises CertmountError if the content is invalid; once for each content, or at every call while there is no value.
        """
        digest = ""
        try:
            contents = await asyncio.to_thread(self._read)
            digest = _digest(contents)
            retry = self._valid_later and self._rejected is not None
            if digest == self._digest and self.value is not None and not retry:
                return self.value
            value = await asyncio.to_thread(self._parse, contents)
        except CertmountError as error:
            reported, self._rejected = self._rejected, (digest, str(error))
            self._digest = digest
            if self._rejected == reported and self.value is not None:
                return self.value
            self._on_rejected()
            raise
        self.value, self._digest, self._rejected = value, digest, None
        self._on_change(value)
        return value

    async def refresh(self) -> _T:
        """Do what :meth:`load` does, but log the error and return the previous value if there is one."""
        try:
            return await self.load()
        except CertmountError as error:
            if self.value is None:
                raise
            self._log(error)
            return self.value

    async def run(self, interval_s: float) -> None:
        """Refresh the value every ``interval_s`` seconds until cancelled."""
        await run_periodically(interval_s, self.load, self._log)

    def _log(self, error: CertmountError) -> None:
        event = f"{self._what} rejected; the previous {self._what} stays in force"
        log.error(event, reason=error.reason.word, error=str(error))


def read_file(file: Path, max_bytes: int, reason: Reason, hint: str) -> bytes:
    """Return the content of a regular file, at most ``max_bytes`` + 1 bytes.

    Raises CertmountError with this reason and hint if the file can't be read.
    """
    try:
        return read_regular_file(file, max_bytes)
    except OSError as error:
        raise _unreadable(error, file, reason, hint) from None


def read_regular_file(file: Path, max_bytes: int) -> bytes:
    """Do what :func:`read_file` does, but raise OSError. A named pipe is an error, and does not block."""
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    content = _content(str(file), None, max_bytes)
    if content is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    return content


def read_directory(
    directory: Path,
    selects: Callable[[str], bool],
    max_bytes: int,
    reason: Reason,
    hint: str,
    *,
    special_as_empty: bool = False,
) -> Contents:
    """Return the contents of the files that ``selects`` accepts, at most ``max_bytes`` + 1 bytes of each.

    All contents belong to one generation if the kubelet mounted the directory. A file that is not regular, such as a
    named pipe, is an error for the whole directory, or empty if ``special_as_empty`` is set.
    Raises CertmountError with this reason and hint if the directory or a file can't be read.
    """
    try:
        for _ in range(_READ_ATTEMPTS):
            with _opened(directory) as descriptor:
                contents = {
                    name: content
                    for name in sorted(filter(selects, os.listdir(descriptor)))  # noqa: PTH208  # pathlib can't list a descriptor
                    if (content := _content(name, descriptor, max_bytes, special_as_empty=special_as_empty)) is not None
                }
                # The kubelet removes the previous generation while it is read here; its files then seem to be missing.
                with _opened(directory) as current:
                    if os.path.samestat(os.fstat(descriptor), os.fstat(current)):
                        return contents
    except OSError as error:
        raise _unreadable(error, directory, reason, hint) from None
    raise CertmountError(reason, Fault(str(directory), "changes faster than it can be read", hint))


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    try:
        descriptor = os.open(directory / _KUBELET_LINK, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _content(name: str, directory: int | None, max_bytes: int, *, special_as_empty: bool = False) -> bytes | None:
    """Return the content of a file, or None if it doesn't exist; raise OSError."""
    try:
        # Without O_NONBLOCK, opening a named pipe would block until something writes to it.
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if special_as_empty and error.errno == errno.ENXIO:  # a socket
            return b""
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            if special_as_empty:
                return b""
            raise OSError(0, "is not a regular file", name)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes + 1)
    finally:
        os.close(descriptor)


def _unreadable(error: OSError, path: Path, reason: Reason, hint: str) -> CertmountError:
    return CertmountError(reason, Fault(str(error.filename or path), f"cannot be read: {error.strerror}", hint))


def _digest(contents: Contents) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(os.fsencode(name) + f" {len(content)} ".encode() + content)  # a name can be no UTF-8
    return digest.hexdigest()
