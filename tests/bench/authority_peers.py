"""The two authorities that are compared, each a process on the same one core, and the program that asks them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from jwt.algorithms import ECAlgorithm

from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.spec import KeyType
from tests.bench.authority_input import Provisioner
from tests.bench.process import cpu_s
from tests.bench.world import WrongResult
from tests.integration.authority.world import SERVING_NAME
from tests.support.driver import free_port
from tests.support.tokens import TokenIssuer

SERVER_CORE, LOAD_CORE = (sorted(os.sched_getaffinity(0)) * 2)[:2]
_CACHE = Path(os.environ.get("CERTMOUNT_CACHE") or Path.home() / ".cache" / "certmount")
_LOADGEN = Path(__file__).parent / "loadgen"


@dataclass(frozen=True, slots=True)
class Peer:
    """An authority that runs."""

    kind: str
    """As the load generator knows it."""
    pid: int
    address: str
    name: str
    roots: Path

    async def asked(self, program: Path, requests: Path, workers: int, warm: int, *options: str) -> Load:
        """Sends all requests of a file from a number of connections at once; ``options`` are the load generator's."""
        arguments = [f"-kind={self.kind}", f"-address={self.address}", f"-name={self.name}", f"-roots={self.roots}"]
        command = _pinned(LOAD_CORE, str(program), *arguments, f"-requests={requests}", f"-workers={workers}")
        before = cpu_s(self.pid)
        process = await asyncio.create_subprocess_exec(
            *command, f"-warm={warm}", *options, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        used = cpu_s(self.pid) - before
        if process.returncode:
            raise WrongResult(f"the load generator failed against {self.kind}")
        result = json.loads(out)
        if result["problems"]:
            raise WrongResult(f"{self.kind}: {'; '.join(result['problems'])}")
        return Load(
            result["answers"] / result["seconds"],
            result["p50_s"] * 1000,
            result["p99_s"] * 1000,
            used / (result["answers"] + warm) * 1e6,
            result["processor_s"] / result["seconds"],
        )


@dataclass(frozen=True, slots=True)
class Load:
    """What one file of requests came to."""

    a_second: float
    p50_ms: float
    p99_ms: float
    server_us: float
    """Of the server's processor time for each request, connections included."""
    generator_share: float
    """Of the generator's core."""


async def build_load_generator() -> Path | None:
    """The program, built outside the checkout when its source is new; None without Go."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(_LOADGEN.iterdir()))).hexdigest()[:12]
    program = _CACHE / f"loadgen-{digest}" / "loadgen"
    if not program.exists():
        go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
        if go is None:
            return None
        build = await asyncio.create_subprocess_exec(
            go, "build", "-o", str(program), ".", cwd=_LOADGEN, env={**os.environ, "CGO_ENABLED": "0"}
        )
        if await build.wait():
            raise WrongResult("the load generator cannot be built")
    return program


def find_step_ca() -> str | None:
    """The program, where scripts/install-peers puts it or on PATH."""
    folders = os.pathsep.join(map(str, sorted(_CACHE.glob("step-ca-*"), reverse=True)))
    return shutil.which("step-ca", path=folders) or shutil.which("step-ca")


@asynccontextmanager
async def certmount(folder: Path, issuer: TokenIssuer) -> AsyncIterator[Peer]:
    """The authority of certmount for the length of the block."""
    _write(folder, {"jwks.json": issuer.published.jwks})
    command = _pinned(SERVER_CORE, sys.executable, "-m", "tests.bench.authority_server", str(folder))
    pipe = asyncio.subprocess.PIPE
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=log)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = (await process.stdout.readline()).decode().strip()
        if not port:
            raise _silent("the authority", folder)
        address = f"127.0.0.1:{port}"
        yield Peer("certmount", process.pid, address, SERVING_NAME, folder / "ca" / "authority.crt")
    finally:
        process.stdin.close()
        await process.wait()


@asynccontextmanager
async def step_ca(program: str, folder: Path) -> AsyncIterator[tuple[Peer, Provisioner]]:
    """step-ca on one core and without a database for the length of the block, with a JWK provisioner and an EC-P256 chain."""
    address = f"127.0.0.1:{free_port()}"
    key = generate_key(KeyType.EC_P256)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    provisioner = Provisioner("csi", key, "bench", "https://localhost/1.0/sign")
    _write_step_ca(folder, address, provisioner)
    environment = {**os.environ, "STEPPATH": str(folder), "GOMAXPROCS": "1"}
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *_pinned(SERVER_CORE, program, str(folder / "ca.json")), env=environment, stdout=log, stderr=log
        )
    try:
        await _listening(address, process)
        if process.returncode is not None:
            raise _silent("step-ca", folder)
        yield Peer("step-ca", process.pid, address, "localhost", folder / "root.crt"), provisioner
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _write_step_ca(folder: Path, address: str, provisioner: Provisioner) -> None:
    keyring = make_keyring(utc_now())
    jwk: dict[str, Any] = ECAlgorithm.to_jwk(provisioner.key.public_key(), as_dict=True)
    configuration = {
        "root": str(folder / "root.crt"),
        "crt": str(folder / "ca.crt"),
        "key": str(folder / "ca.key"),
        "address": address,
        "dnsNames": ["localhost"],
        "logger": {"format": "json"},
        "authority": {
            "provisioners": [
                {
                    "type": "JWK",
                    "name": provisioner.name,
                    "key": {**jwk, "kid": provisioner.key_id, "use": "sig", "alg": "ES256"},
                }
            ]
        },
    }
    files = {
        "root.crt": keyring.roots_pem,
        "ca.crt": keyring.intermediate.certificate.public_bytes(Encoding.PEM),
        "ca.key": encode_key(keyring.intermediate.key).reveal(),
        "ca.json": json.dumps(configuration).encode(),
    }
    _write(folder, files)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


async def _listening(address: str, process: asyncio.subprocess.Process) -> None:
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(30):
        while process.returncode is None:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(0.02)  # step-ca tells no one that it listens
            else:
                writer.close()
                return


def _silent(what: str, folder: Path) -> WrongResult:
    return WrongResult(f"{what} does not serve:\n{(folder / 'log').read_text()}")


def _pinned(core: int, *command: str) -> list[str]:
    """taskset(1): on one core from its first moment, so that a program sees one and makes its threads for one."""
    return ["taskset", "--cpu-list", str(core), *command]
