"""What is in a volume, whether its files fit together, and what a client will think of its certificate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver.core.certificates.keys import key_type_of, public_bytes
from csi_driver.core.certificates.parsing import PARSE_ERRORS, extension_of
from csi_driver.core.certificates.verification import chain_problems
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.texts import timestamp
from csi_driver.doctor.handshake import client_problem, server_problem
from csi_driver.doctor.volume_files import VolumeFileContent, is_ca

_MAX_TESTED = 5
_MAX_NAME = 300


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the other side of a connection does. ``problem`` is empty if it accepts the certificate."""

    peer: str
    problem: str


@dataclass(frozen=True, slots=True)
class InspectedVolume:
    """The files of a volume. ``names`` are those that clients connect to; by default some of the certificate."""

    directory: str
    generation: str
    files: Sequence[VolumeFileContent]
    names: Sequence[str]
    now: datetime

    @property
    def chain(self) -> Sequence[x509.Certificate]:
        """The certificate and its intermediates. A self-signed certificate with its key is both a chain and a root."""
        found = max((each.certificates for each in self.files if each.has_chain), key=len, default=())
        return found or next((each.certificates[:1] for each in self.files if self._has_key(each.certificates)), ())

    @property
    def roots(self) -> Sequence[x509.Certificate]:
        found = (each.certificates for each in self.files if each.certificates and all(map(is_ca, each.certificates)))
        return max(found, key=len, default=())

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the files, without the opinions of clients."""
        yield from (f"{each.name}: {each.problem}" for each in self.files if each.problem)
        if not self.chain and not self.roots:
            yield "the directory has no certificates"
        yield from self._differences()
        if self.chain and self.roots:
            yield from chain_problems(self.chain, self.roots, self.now)
        elif self.chain:
            yield "the directory has no root certificates, so nothing verifies the chain"
        yield from self._summary_problems()

    def verdicts(self) -> Iterator[Verdict]:
        """Yield the result of a TLS handshake for each name, and of one as a client."""
        key = next((each.key for each in self.files if each.key is not None), None)
        if not self.chain or not self.roots or key is None:
            return
        hosts = [str(each.value) for each in _names(self.chain[0]) if isinstance(each, x509.DNSName | x509.IPAddress)]
        for name in self.names or [each.replace("*", "any") for each in hosts[:_MAX_TESTED]]:
            yield Verdict(f"a client that connects to {name}", server_problem(self.chain, key, self.roots, name))
        yield Verdict("a server that requires a client certificate", client_problem(self.chain, key, self.roots))

    def document(self) -> dict[str, Any]:
        """Return the JSON output. Times have the format of RFC 3339."""
        verdicts = list(self.verdicts())
        rejected = [f"{each.peer} rejects the certificate: {each.problem}" for each in verdicts if each.problem]
        renew_at = next((each.summary.get("renew_at") for each in self.files if each.summary), None)
        return {
            "directory": self.directory,
            "generation": self.generation,
            "files": [_file(each) for each in self.files],
            "certificate": {**_certificate(self.chain[0]), "renewAt": renew_at} if self.chain else None,
            "intermediates": [_certificate(each) for each in self.chain[1:]],
            "roots": [_certificate(each) for each in self.roots],
            "verdicts": [
                {"peer": each.peer, "accepts": not each.problem, "problem": each.problem} for each in verdicts
            ],
            "problems": [*self.problems(), *rejected],
        }

    def _has_key(self, certificates: Sequence[x509.Certificate]) -> bool:
        keys = [public_bytes(each.key.public_key()) for each in self.files if each.key is not None]
        return bool(certificates) and _public_bytes(certificates[0]) in keys

    def _differences(self) -> Iterator[str]:
        """Yield files that do not belong to the certificate or the roots of the others."""
        leaf, roots = (self.chain[0] if self.chain else None), set(self.roots)
        for each in self.files:
            if each.has_chain and each.certificates[0] != leaf:
                yield f"{each.name}: has another certificate than the other files"
            if each.key is not None and leaf is not None and public_bytes(each.key.public_key()) != _public_bytes(leaf):
                yield f"{each.name}: the private key does not match the certificate"
            if each.key is not None and leaf is None and self.roots:
                yield f"{each.name}: the private key matches no certificate"
            if each.certificates and not each.has_chain and set(each.certificates) != roots:
                yield f"{each.name}: has other roots than the other files"

    def _summary_problems(self) -> Iterator[str]:
        for each in (each for each in self.files if each.summary):
            serial = f"{self.chain[0].serial_number:x}" if self.chain else "no certificate"
            if each.summary.get("serial") != serial:
                yield f"{each.name}: describes the certificate {each.summary.get('serial')}, but the files have {serial}"
            found = {root.fingerprint(SHA256()).hex() for root in self.roots}
            stated = each.summary.get("roots_sha256")
            if self.roots and (not isinstance(stated, list) or set(map(str, stated)) != found):
                yield f"{each.name}: describes other roots than the files have"


def _file(file: VolumeFileContent) -> dict[str, Any]:
    return {
        "name": file.name,
        "kind": file.kind,
        "mode": f"{file.mode:04o}",
        "uid": file.uid,
        "gid": file.gid,
        "certificates": len(file.certificates),
        "problem": file.problem,
    }


def _certificate(certificate: x509.Certificate) -> dict[str, Any]:
    key_type = key_type_of(_public_key(certificate))
    return {
        "subject": _text(certificate.subject),
        "names": [_name_text(name) for name in _names(certificate)],
        "issuer": _text(certificate.issuer),
        "serial": f"{certificate.serial_number:x}",
        "fingerprint": fingerprint(certificate),
        "notBefore": timestamp(certificate.not_valid_before_utc),
        "notAfter": timestamp(certificate.not_valid_after_utc),
        "keyType": key_type.value if key_type else None,
        "usages": _usages(certificate),
    }


def _usages(certificate: x509.Certificate) -> list[str]:
    usages = {ExtendedKeyUsageOID.SERVER_AUTH: "server", ExtendedKeyUsageOID.CLIENT_AUTH: "client"}
    found = extension_of(certificate, x509.ExtendedKeyUsage) or ()
    return [usages.get(each, each.dotted_string) for each in found]


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """Return all names, also those that certmount does not issue."""
    return list(extension_of(certificate, x509.SubjectAlternativeName) or ())


def _name_text(name: x509.GeneralName) -> str:
    shown = (x509.DNSName, x509.UniformResourceIdentifier, x509.IPAddress, x509.RFC822Name)
    return str(name.value)[:_MAX_NAME] if isinstance(name, shown) else f"({type(name).__name__})"


def _public_key(certificate: x509.Certificate) -> Any:
    try:
        return certificate.public_key()
    except PARSE_ERRORS:
        return None


def _public_bytes(certificate: x509.Certificate) -> bytes:
    key = _public_key(certificate)
    return public_bytes(key) if key is not None else b""


def _text(name: x509.Name) -> str:
    return name.rfc4514_string()[:200]
