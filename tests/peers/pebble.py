"""Pebble, Let's Encrypt's CA for tests, in strict mode."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.peers.processes import LOOPBACK, listening, running
from tests.support.ports import free_port
from tests.support.requirements import require_program
from tests.support.waiting import until

_ORDER_LINE = re.compile(r'Added order "(?P<id>[^"]+)" to the db')
_ISSUED_LINE = re.compile(r"Issued certificate serial (?P<serial>\w+) for order (?P<order>\S+)")


@dataclass(frozen=True)
class Pebble:
    """One CA, whose state is in memory only."""

    directory: Path
    dns: str  # The DNS server that it queries
    http_port: int = 5002  # The port for HTTP-01, instead of port 80
    nonce_reject: int = 0  # The percentage of valid nonces that it rejects
    retry_after_s: int = 1  # The Retry-After of authorizations and orders; at least 1
    profiles: Mapping[str, Any] = field(
        default_factory=lambda: {"default": {"description": "", "validityPeriod": 7776000}}
    )
    external_accounts: Mapping[str, str] = field(default_factory=dict)
    """MAC keys by key id; if there are any, accounts must be bound."""
    environment: Mapping[str, str] = field(default_factory=dict)
    host: str = LOOPBACK  # Where it listens: the address of a bridge if the authority is in a pod
    port: int = field(default_factory=free_port)
    management_port: int = field(default_factory=free_port)

    @property
    def directory_url(self) -> str:
        return f"https://{'localhost' if self.host == LOOPBACK else self.host}:{self.port}/dir"

    @property
    def ca_file(self) -> str:
        return str(self.directory / "tls.crt")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        pebble = require_program("pebble")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write()
        environment = {
            "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": str(self.nonce_reject), "PEBBLE_AUTHZREUSE": "0",
            **self.environment,
        }  # fmt: skip
        arguments = [pebble, "-config", str(self.directory / "config.json"), "-dnsserver", self.dns, "-strict"]
        async with running(arguments, self._log, self.port, environment, host=self.host):
            await until(lambda: listening(self.management_port), "the management port")
            yield

    @property
    def orders(self) -> list[str]:
        return [match["id"] for match in _ORDER_LINE.finditer(self._text)]

    @property
    def issued(self) -> list[str]:
        return [match["serial"] for match in _ISSUED_LINE.finditer(self._text)]

    @property
    def validations(self) -> int:
        return self._text.count("Pulled a task from the Tasks queue")

    async def root(self, number: int = 0) -> bytes:
        return x509.load_pem_x509_certificate(await self.root_pem(number)).public_bytes(Encoding.DER)

    async def root_pem(self, number: int = 0) -> bytes:
        return await self._management("GET", f"roots/{number}")

    async def set_renewal(self, certificate: x509.Certificate, start: str, end: str) -> None:
        """Set the suggested renewal window of a certificate (RFC 9773); times are RFC 3339."""
        response = {"suggestedWindow": {"start": start, "end": end}}
        pem = certificate.public_bytes(Encoding.PEM).decode("ascii")
        body = {"certificate": pem, "ariResponse": json.dumps(response)}
        await self._management("POST", "set-renewal-info/", body)

    async def _management(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        url = f"https://{LOOPBACK}:{self.management_port}/{path}"
        async with (
            aiohttp.ClientSession(trust_env=False) as session,
            session.request(method, url, json=body, ssl=False) as answer,
        ):
            content = await answer.read()
            assert answer.status == 200, f"{path}: {answer.status} {content!r}"
            return content

    @property
    def _log(self) -> Path:
        return self.directory / "pebble.log"

    @property
    def _text(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def _write(self) -> None:
        configuration = {
            "listenAddress": f"{self.host}:{self.port}", "managementListenAddress": f"{LOOPBACK}:{self.management_port}",
            "certificate": self.ca_file, "privateKey": str(self.directory / "tls.key"), "httpPort": self.http_port,
            "tlsPort": free_port(), "externalAccountBindingRequired": bool(self.external_accounts),
            "externalAccountMACKeys": dict(self.external_accounts),
            "retryAfter": {"authz": self.retry_after_s, "order": self.retry_after_s}, "keyAlgorithm": "ecdsa",
            "profiles": dict(self.profiles),
        }  # fmt: skip
        (self.directory / "config.json").write_text(json.dumps({"pebble": configuration}), encoding="ascii")
        if not Path(self.ca_file).exists():
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                 "-subj", "/CN=localhost", "-addext", f"subjectAltName=DNS:localhost,IP:{self.host}",
                 "-keyout", str(self.directory / "tls.key"), "-out", self.ca_file],
                check=True, capture_output=True,
            )  # fmt: skip
