"""A real step-ca on loopback, with its own CA and provisioner."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.provisioner_key import thumbprint
from csi_driver.core.config.issuers import FileSource
from tests.support.ports import free_port
from tests.support.requirements import require_program
from tests.unit.core import pki

PROVISIONER = "csi"
_START_TIMEOUT_S = 30.0
_VALIDITY = pki.Validity(-timedelta(days=3650), timedelta(days=36500))


def new_jwk() -> dict[str, str]:
    numbers = ec.generate_private_key(ec.SECP256R1()).private_numbers()
    public = numbers.public_numbers
    jwk = {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "x": _number(public.x), "y": _number(public.y)}
    return {**jwk, "kid": thumbprint(jwk) or "", "d": _number(numbers.private_value)}


def public_jwk(jwk: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in jwk.items() if name != "d"}


@dataclass
class RealStepCA:
    """One step-ca with its files in ``directory``."""

    directory: Path
    name: str = "Test"
    claims: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # Options of the provisioner, such as a template
    federated: Sequence[Path] = ()
    encrypted_key: str = ""
    jwk: dict[str, str] = field(default_factory=new_jwk)
    provisioner: str = PROVISIONER
    listen: str = "127.0.0.1"
    names: Sequence[str] = ("localhost",)  # Its host names; the first is used in its URL

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.root_file = self.directory / "root_ca.crt"
        self.key_file = self.directory / "provisioner.jwk"
        self.key_file.write_text(json.dumps(self.jwk))
        self.root = self._make_ca()
        self.port = free_port()
        self.log = self.directory / "step-ca.log"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"https://{self.names[0]}:{self.port}"

    @property
    def root_sha256(self) -> str:
        return self.root.fingerprint(SHA256()).hex()

    @property
    def root_der(self) -> bytes:
        return self.root.public_bytes(Encoding.DER)

    def configuration(self, **changes: Any) -> StepCAConfiguration:
        key = FileSource(str(self.key_file))
        configuration = StepCAConfiguration(self.url, self.provisioner, root_sha256=self.root_sha256, key=key)
        return replace(configuration, **changes)

    async def start(self) -> None:
        self._configure()
        command = [require_program("step-ca"), str(self.directory / "ca.json")]
        environment = {"STEPPATH": str(self.directory), "PATH": "/usr/bin:/bin", "HOME": str(self.directory)}
        nothing = asyncio.subprocess.DEVNULL
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, env=environment, stdin=nothing, stdout=log, stderr=log
            )
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not await asyncio.to_thread(self._healthy):
                assert self._process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _healthy(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.root_file))
        try:
            with urllib.request.urlopen(f"{self.url}/health", context=context, timeout=5) as response:
                return bool(json.load(response)["status"] == "ok")
        except OSError:
            return False

    def _configure(self) -> None:
        provisioner = {
            "type": "JWK", "name": self.provisioner, "key": public_jwk(self.jwk), "encryptedKey": self.encrypted_key,
            "claims": self.claims, "options": self.options,
        }  # fmt: skip
        given = {name: value for name, value in provisioner.items() if value}
        document = {
            "root": str(self.root_file), "federatedRoots": [str(path) for path in self.federated],
            "crt": str(self.directory / "intermediate_ca.crt"), "key": str(self.directory / "intermediate_ca.key"),
            "address": f"{self.listen}:{self.port}", "dnsNames": list(self.names),
            "authority": {"provisioners": [given, {"type": "ACME", "name": "acme"}]},
            "db": {"type": "badgerv2", "dataSource": str(self.directory / "db")},
        }  # fmt: skip
        (self.directory / "ca.json").write_text(json.dumps(document))

    def _make_ca(self) -> x509.Certificate:
        root = pki.authority(f"{self.name} Root CA", validity=_VALIDITY)
        intermediate = pki.authority(f"{self.name} Intermediate CA", root, path_length=0, validity=_VALIDITY)
        self.root_file.write_bytes(root.certificate.public_bytes(Encoding.PEM))
        (self.directory / "intermediate_ca.crt").write_bytes(intermediate.certificate.public_bytes(Encoding.PEM))
        key = intermediate.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.directory / "intermediate_ca.key").write_bytes(key)
        return root.certificate


def _number(value: int) -> str:
    return base64.urlsafe_b64encode(value.to_bytes(32)).rstrip(b"=").decode()
