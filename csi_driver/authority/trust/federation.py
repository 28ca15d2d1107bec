"""Further sets of roots from a folder, such as a mounted ConfigMap: each file ``NAME.crt`` or ``NAME.pem`` is the set NAME."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.certificate_check import ca_certificate_problems
from csi_driver.authority.ca.rotation import next_generation
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates, fingerprint
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_CHECK_S = 2.0
"""A ConfigMap reaches its volume within a minute or so; next to that, two seconds are nothing."""
_MAX_BYTES = 256 * 1024
_MOST_ROOTS = 10
"""Nodes take no set with more."""
_MOST_SETS = 64
_SUFFIXES = (".crt", ".pem")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
_KUBELETS = "..data"
"""The link by which the kubelet changes all files of a mounted ConfigMap at once."""


class FederationDirectory:
    """Keeps :class:`TrustBundles` in step with a folder. A file that becomes bad keeps its former roots; one that goes takes its set along."""

    def __init__(
        self,
        folder: Path,
        trust: TrustBundles,
        metrics: AuthorityMetrics,
        clock: Callable[[], float],
        reserved: Container[str],
    ) -> None:
        """``clock`` gives unix seconds; ``reserved`` are the names of issuers as they are at any time, which have sets of their own."""
        self._folder = folder
        self._trust = trust
        self._metrics = metrics
        self._clock = clock
        self._reserved = reserved
        # The digest of each file's content when it was last looked at.
        self._seen: dict[str, str] = {}
        # By the name of each set that there is, or was: so a set that comes back is newer than before it went.
        self._generations: dict[str, int] = {}
        self._sets: dict[str, RootSet] = {}
        self._unreadable = ""

    async def load(self) -> None:
        """Takes what has changed in the folder. What is wrong is logged and counted, once for each content."""
        try:
            files = await asyncio.to_thread(self._read)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            if problem != self._unreadable:
                self._refused(_wrong(str(error.filename or self._folder), problem, "see --federation-dir"))
            self._unreadable = problem
            return
        self._unreadable = ""
        if files.keys() != self._seen.keys():
            self._seen = {}  # what was wrong with one file may have been the presence of another
        for file, content in sorted(files.items()):
            self._take(file, content)
        names = {_set_name(file) for file in files}
        for name in [name for name in self._sets if name not in names]:
            del self._sets[name]
            self._trust.drop_roots(name)
            log.info("federation removed", set=name)

    async def run(self) -> None:
        """Follows the folder for ever."""
        while True:
            await asyncio.sleep(_CHECK_S)
            await self.load()

    def _take(self, file: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        if self._seen.get(file) == digest:
            return
        self._seen[file] = digest
        name = _set_name(file)
        try:
            self._check_name(file, name)
            certificates = _parse(file, content)
        except CertmountError as error:
            self._refused(error)
            return
        roots = tuple(dict.fromkeys(each.public_bytes(Encoding.DER) for each in certificates))
        if name in self._sets and self._sets[name].roots == roots:
            return
        self._generations[name] = next_generation(self._generations.get(name, 0), int(self._clock()))
        self._sets[name] = RootSet(roots, self._generations[name])
        self._trust.set_roots(name, self._sets[name])
        log.info("federation taken", set=name, roots=[fingerprint(one) for one in certificates])

    def _check_name(self, file: str, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise _wrong(file, "has a name that no pod can ask for", "take lower-case letters, digits, - and .")
        if name in self._reserved:
            raise _wrong(file, f"has the name of an issuer, {name}, which has roots of its own")
        if any(other != file and _set_name(other) == name for other in self._seen):
            raise _wrong(file, f"stands for the set {name}, and so does another file")
        if name not in self._sets and len(self._sets) >= _MOST_SETS:
            raise _wrong(file, f"is one too many: {_MOST_SETS} sets are taken")

    def _refused(self, error: CertmountError) -> None:
        self._metrics.federation_failures.inc()
        log.error("federation refused; what was there before stays", reason=error.reason.word, error=str(error))

    def _read(self) -> Mapping[str, bytes]:
        """The content of each file; raises OSError. All of one state of the folder, where the kubelet writes it."""
        try:
            folder = os.open(self._folder / _KUBELETS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return {name: _content(name, folder) for name in os.listdir(folder) if name.endswith(_SUFFIXES)}  # noqa: PTH208  # a descriptor stays with one state of the folder
        finally:
            os.close(folder)


def _content(name: str, folder: int) -> bytes:
    # O_NONBLOCK, as opening a pipe would wait for its writer for ever.
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(_MAX_BYTES + 1)


def _parse(file: str, content: bytes) -> list[x509.Certificate]:
    """Raises CertmountError InvalidCA, with all that is wrong."""
    if len(content) > _MAX_BYTES:
        raise _wrong(file, f"is longer than {_MAX_BYTES} bytes")
    try:
        certificates = decode_certificates(content)
    except ValueError:
        raise _wrong(file, "holds no certificates in PEM") from None
    if len(certificates) > _MOST_ROOTS:
        raise _wrong(file, f"holds {len(certificates)} certificates; nodes take {_MOST_ROOTS}")
    faults = [
        Fault(file, f"certificate {number} {problem}")
        for number, certificate in enumerate(certificates, start=1)
        for problem in ca_certificate_problems(certificate)
    ]
    if faults:
        raise CertmountError(Reason.INVALID_CA, *faults)
    return certificates


def _set_name(file: str) -> str:
    return file.rpartition(".")[0]


def _wrong(file: str, problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.INVALID_CA, Fault(file, problem, hint))
