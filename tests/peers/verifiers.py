"""Verifiers of certificates: OpenSSL, Go, cryptography (rules of the Web PKI), and strict DER rules."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from OpenSSL import crypto

from csi_driver.authority.ca.keyring import Keyring
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.spec import KeyType, Usage
from tests.support.requirements import openssl_for, require_program

_SOURCE = Path(__file__).parent / "x509check" / "main.go"
_PURPOSES = {Usage.SERVER: "sslserver", Usage.CLIENT: "sslclient"}


@dataclass(frozen=True, slots=True)
class Presented:
    """A leaf with its chain, as a TLS peer sends it, and trusted roots. The PEM files are in ``folder``."""

    keyring: Keyring
    leaf: x509.Certificate
    now: datetime
    folder: Path

    def __post_init__(self) -> None:
        for name, certificates in (
            ("root", self.keyring.roots),
            ("chain", self.keyring.intermediates),
            ("leaf", [self.leaf]),
        ):
            (self.folder / f"{name}.pem").write_bytes(encode_certificates(certificates))

    def _files(self) -> list[str]:
        return [str(self.folder / f"{name}.pem") for name in ("root", "chain", "leaf")]

    def openssl(self, usage: Usage, *kinds: KeyType) -> str:
        """Return the error of OpenSSL in strict mode; empty if it accepts the chain."""
        root, chain, leaf = self._files()
        command = [openssl_for(*kinds), "verify", "-x509_strict", "-attime", str(int(self.now.timestamp()))]
        command += ["-purpose", _PURPOSES[usage], "-CAfile", root, "-untrusted", chain, leaf]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def newest_openssl(self) -> str:
        """Return the error of the OpenSSL in the cryptography package, which is newer than those of distributions."""
        store = crypto.X509Store()
        store.set_flags(crypto.X509StoreFlags.X509_STRICT)
        store.set_time(self.now)
        for root in self.keyring.roots:
            store.add_cert(crypto.X509.from_cryptography(root))
        chain = [crypto.X509.from_cryptography(one) for one in self.keyring.intermediates]
        context = crypto.X509StoreContext(store, crypto.X509.from_cryptography(self.leaf), chain)
        try:
            context.verify_certificate()
        except crypto.X509StoreContextError as error:
            return str(error)
        return ""

    def go(self, usage: Usage, dns_name: str = "") -> dict[str, Any]:
        """Return what Go parses; ``error`` is empty if Go accepts the chain."""
        command = [go_checker(), str(int(self.now.timestamp())), usage.value, *self._files(), dns_name]
        seen: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return seen

    def webpki(self, usage: Usage, subject: x509.DNSName | x509.IPAddress | None = None) -> str:
        """Return the error of cryptography's verifier (rules of the Web PKI); empty if it accepts the chain."""
        builder = PolicyBuilder().store(Store(list(self.keyring.roots))).time(self.now)
        try:
            if usage is Usage.CLIENT:
                builder.build_client_verifier().verify(self.leaf, list(self.keyring.intermediates))
            elif subject is not None:
                builder.build_server_verifier(subject).verify(self.leaf, list(self.keyring.intermediates))
        except VerificationError as error:
            return str(error)
        return ""


def go_checker() -> str:
    """Return the program x509check, built outside the checkout once for each source and version of Go."""
    go = require_program("go")
    version = subprocess.run([go, "env", "GOVERSION"], capture_output=True, check=True).stdout
    mark = hashlib.sha256(_SOURCE.read_bytes() + version).hexdigest()[:12]
    cache = Path(os.environ.get("CERTMOUNT_CACHE") or Path.home() / ".cache" / "certmount")
    program = cache / f"x509check-{mark}" / "x509check"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        built = program.with_name(f".x509check.{os.getpid()}")
        environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
        subprocess.run([go, "build", "-o", str(built), str(_SOURCE)], check=True, env=environment)
        built.replace(program)
    return str(program)


def encoding_faults(certificate: x509.Certificate) -> list[str]:
    """Return violations of RFC 5280 section 4.1 in the DER that lenient verifiers accept."""
    fields = list(_children(next(_children(certificate.tbs_certificate_bytes))[1]))
    (version_tag, version), (_, serial), _, _, (_, validity), (_, subject), _, (_, extensions) = fields
    identifiers = [next(_children(value))[1] for _, value in _children(next(_children(extensions))[1])]
    times = list(_children(validity))
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    checks = (
        (version_tag == 0xA0 and version == b"\x02\x01\x02", "version 3"),
        (0 < len(serial) <= 20 and serial[0] < 0x80 and any(serial), "a positive serial number of at most 20 octets"),
        (len(set(identifiers)) == len(identifiers), "each extension once"),
        (all(_canonical(tag, text) for tag, text in times), "times in their one form"),
        (alternative.critical == (subject == b""), "names critical where the subject is empty, and only there"),
    )
    return [wanted for good, wanted in checks if not good]


def _canonical(tag: int, text: bytes) -> bool:
    """Check for UTCTime through 2049 and GeneralizedTime from 2050, in seconds and UTC (section 4.1.2.5)."""
    digits = {0x17: 12, 0x18: 14}[tag]
    return len(text) == digits + 1 and text[:-1].isdigit() and text[-1:] == b"Z" and (tag == 0x17 or text >= b"2050")


def _children(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and content of each element. DER has definite lengths only."""
    while der:
        tag, length, start = der[0], der[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start], "big")
        content, der = der[start : start + length], der[start + length :]
        yield tag, content
