"""Root sets of federations from a directory, such as a mounted ConfigMap: ``NAME.crt`` or ``NAME.pem`` is the set NAME."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.certificate_check import ca_certificate_problems
from csi_driver.authority.ca.rotation import next_generation
from csi_driver.authority.config.watched_file import Contents, WatchedFile, read_directory
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates, fingerprint
from csi_driver.core.names import InvalidName, parse_dns_label
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_CHECK_S = 2.0  # short compared with the minute that the kubelet needs to update a mounted ConfigMap
_MAX_BYTES = 256 * 1024
_MAX_ROOTS = 10  # nodes reject a root set with more
_MAX_SETS = 64
_SUFFIXES = (".crt", ".pem")


@dataclass(frozen=True, slots=True)
class _FederationFile:
    digest: str
    certificates: tuple[x509.Certificate, ...]
    error: CertmountError | None = None


class FederationDirectory:
    """Publishes the root sets of a directory. An invalid file keeps its previous roots; a removed file removes its set."""

    def __init__(
        self,
        directory: Path,
        trust: TrustBundles,
        metrics: AuthorityMetrics,
        clock: Callable[[], float],
        reserved: Container[str],
    ) -> None:
        """``clock`` returns Unix seconds. ``reserved`` are the names of issuers, which have root sets too."""
        self._trust = trust
        self._metrics = metrics
        self._clock = clock
        self._reserved = reserved
        self._files: Mapping[str, _FederationFile] | None = None  # None: the directory has not been read
        # Including removed sets: a set that returns needs a higher generation than before.
        self._generations: dict[str, int] = {}
        self._sets: dict[str, RootSet] = {}
        self._watched: WatchedFile[Mapping[str, _FederationFile]] = WatchedFile(
            "federation directory",
            lambda: read_directory(
                directory,
                lambda name: name.endswith(_SUFFIXES),
                _MAX_BYTES,
                Reason.INVALID_CA,
                "see --federation-dir",
                special_as_empty=True,  # _parse then rejects only this file
            ),
            _parse_files,
            initial={},
            on_change=self._apply,
            on_rejected=metrics.federation_failures.inc,
        )

    async def load(self) -> None:
        """Publish what changed in the directory. Errors are logged and counted once for each content."""
        await self._watched.refresh()

    async def run(self) -> None:
        await self._watched.run(_CHECK_S)

    def may_contain(self, name: str) -> bool:
        """Return whether there is a file for the root set, even an invalid one, or the directory has not been read."""
        return self._files is None or any(_set_name(file) == name for file in self._files)

    def _apply(self, files: Mapping[str, _FederationFile]) -> None:
        # A file can be invalid only because of another file, so check all files again if their names changed.
        previous = self._files if self._files is not None and self._files.keys() == files.keys() else {}
        self._files = files
        for name, file in sorted(files.items()):
            if name not in previous or previous[name].digest != file.digest:
                self._apply_file(name, file)
        names = {_set_name(file) for file in files}
        for name in [name for name in self._sets if name not in names]:
            del self._sets[name]
            self._trust.remove_roots(name)
            log.info("federation removed", set=name)

    def _apply_file(self, name: str, file: _FederationFile) -> None:
        set_name = _set_name(name)
        if error := self._name_error(name, set_name) or file.error:
            self._metrics.federation_failures.inc()
            log.error("federation rejected; the previous roots stay in use", reason=error.reason.word, error=str(error))
            return
        roots = tuple(dict.fromkeys(certificate.public_bytes(Encoding.DER) for certificate in file.certificates))
        if set_name in self._sets and self._sets[set_name].roots == roots:
            return
        generation = next_generation(self._generations.get(set_name, 0), int(self._clock()))
        self._generations[set_name] = generation
        self._sets[set_name] = RootSet(roots, generation)
        self._trust.set_roots(set_name, self._sets[set_name])
        log.info("federation loaded", set=set_name, roots=[fingerprint(each) for each in file.certificates])

    def _name_error(self, file: str, name: str) -> CertmountError | None:
        try:
            parse_dns_label(name)  # as the attribute federations
        except InvalidName:
            hint = "use 1 to 63 lower-case letters, digits and inner hyphens before .crt or .pem"
            return _invalid(file, "is not a valid name for a root set", hint)
        if name in self._reserved:
            return _invalid(file, f"has the name of the issuer {name}, which has its own root set")
        if any(other < file and _set_name(other) == name for other in self._files or ()):
            return _invalid(file, f"is a second file for the root set {name}")
        if name not in self._sets and len(self._sets) >= _MAX_SETS:
            return _invalid(file, f"exceeds the maximum of {_MAX_SETS} root sets")
        return None


def _parse_files(contents: Contents) -> Mapping[str, _FederationFile]:
    files = {}
    for name, content in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        try:
            files[name] = _FederationFile(digest, tuple(_parse(name, content)))
        except CertmountError as error:
            files[name] = _FederationFile(digest, (), error)
    return files


def _parse(file: str, content: bytes) -> list[x509.Certificate]:
    """Raise CertmountError InvalidCA with all faults."""
    if len(content) > _MAX_BYTES:
        raise _invalid(file, f"is longer than {_MAX_BYTES} bytes")
    try:
        certificates = decode_certificates(content)
    except ValueError:
        raise _invalid(file, "contains no certificates in PEM format") from None
    if len(certificates) > _MAX_ROOTS:
        raise _invalid(file, f"contains {len(certificates)} certificates; the maximum is {_MAX_ROOTS}")
    problems = ((n, problem) for n, each in enumerate(certificates, 1) for problem in ca_certificate_problems(each))
    if faults := [Fault(file, f"certificate {number} {problem}") for number, problem in problems]:
        raise CertmountError(Reason.INVALID_CA, *faults)
    return certificates


def _set_name(file: str) -> str:
    return file.rpartition(".")[0]


def _invalid(file: str, problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.INVALID_CA, Fault(file, problem, hint))
