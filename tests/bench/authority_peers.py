"""Runs the two compared authorities, each as a process on the same core, and the load generator."""

from __future__ import annotations

import asyncio
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
from csi_driver.core.certificates.keys import encode_key
from tests.bench.authority_input import Provisioner
from tests.bench.go_programs import CACHE
from tests.bench.world import WrongResultError
from tests.integration.authority.world import SERVING_NAME
from tests.peers.processes import running
from tests.support.machine import cpu_s
from tests.support.ports import free_port
from tests.support.tokens import TokenIssuer

SERVER_CORE, LOAD_CORE = (sorted(os.sched_getaffinity(0)) * 2)[:2]


@dataclass(frozen=True, slots=True)
class Load:
    """How many connections there are, and how many requests each has in progress."""

    connections: int
    in_flight: int = 1


@dataclass(frozen=True, slots=True)
class Peer:
    """A running authority."""

    pid: int
    address: str
    name: str
    roots: Path

    async def load(self, program: Path, kind: str, requests: Path, load: Load, warm: int, *options: str) -> LoadResult:
        """Send all requests of a file; ``kind`` is the load generator's name for the caller, to which ``options`` are passed."""
        peer = (f"-kind={kind}", f"-address={self.address}", f"-name={self.name}", f"-roots={self.roots}")
        load_options = (f"-connections={load.connections}", f"-in-flight={load.in_flight}", f"-warm={warm}")
        before = cpu_s(self.pid)
        command, pipe = (
            _pinned(LOAD_CORE, str(program), *peer, *load_options, f"-requests={requests}", *options),
            asyncio.subprocess.PIPE,
        )
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe)
        out, _ = await process.communicate()
        used = cpu_s(self.pid) - before
        if process.returncode:
            raise WrongResultError(f"the load generator failed: {kind}")
        result = json.loads(out)
        if result["problems"]:
            raise WrongResultError(f"{kind}: {'; '.join(result['problems'])}")
        return LoadResult(
            result["answers"] / result["seconds"],
            result["p50_s"] * 1000,
            result["p99_s"] * 1000,
            used / (result["answers"] + warm) * 1e6,
            result["processor_s"] / result["seconds"],
        )


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The measurements of one file of requests."""

    a_second: float
    p50_ms: float
    p99_ms: float
    server_us: float  # CPU time of the server per request, including connections
    generator_share: float  # share of the load generator's core that it used


def find_step_ca() -> str | None:
    """Return the program from scripts/install-peers or PATH."""
    directories = os.pathsep.join(map(str, sorted(CACHE.glob("step-ca-*"), reverse=True)))
    return shutil.which("step-ca", path=directories) or shutil.which("step-ca")


@asynccontextmanager
async def certmount(directory: Path, issuer: TokenIssuer) -> AsyncIterator[Peer]:
    _write(directory, {"jwks.json": issuer.published.jwks})
    command = _pinned(SERVER_CORE, sys.executable, "-m", "tests.bench.authority_server", str(directory))
    pipe = asyncio.subprocess.PIPE
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=log)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = (await process.stdout.readline()).decode().strip()
        if not port:
            raise WrongResultError(f"the authority is not serving:\n{(directory / 'log').read_text()}")
        yield Peer(process.pid, f"127.0.0.1:{port}", SERVING_NAME, directory / "ca" / "authority.crt")
    finally:
        process.stdin.close()
        await process.wait()


@asynccontextmanager
async def step_ca(program: str, directory: Path) -> AsyncIterator[tuple[Peer, Provisioner]]:
    """Run step-ca on one core without a database, with a JWK provisioner and an EC-P256 chain."""
    port, key = free_port(), ec.generate_private_key(ec.SECP256R1())
    provisioner = Provisioner("csi", key, "bench", "https://localhost/1.0/sign")
    _write_step_ca(directory, port, provisioner)
    environment = {"STEPPATH": str(directory), "GOMAXPROCS": "1"}
    command = _pinned(SERVER_CORE, program, str(directory / "ca.json"))
    async with running(command, directory / "log", port, environment) as process:
        yield Peer(process.pid, f"127.0.0.1:{port}", "localhost", directory / "root.crt"), provisioner


def _write_step_ca(directory: Path, port: int, provisioner: Provisioner) -> None:
    keyring = make_keyring(utc_now())
    jwk: dict[str, Any] = ECAlgorithm.to_jwk(provisioner.key.public_key(), as_dict=True)
    key = {**jwk, "kid": provisioner.key_id, "use": "sig", "alg": "ES256"}
    configuration = {
        "root": str(directory / "root.crt"),
        "crt": str(directory / "ca.crt"),
        "key": str(directory / "ca.key"),
        "address": f"127.0.0.1:{port}",
        "dnsNames": ["localhost"],
        "logger": {"format": "json"},
        "authority": {"provisioners": [{"type": "JWK", "name": provisioner.name, "key": key}]},
    }
    files = {
        "root.crt": keyring.roots_pem,
        "ca.crt": keyring.intermediate.certificate.public_bytes(Encoding.PEM),
        "ca.key": encode_key(keyring.intermediate.key).reveal(),
        "ca.json": json.dumps(configuration).encode(),
    }
    _write(directory, files)


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _pinned(core: int, *command: str) -> list[str]:
    """Pin a command to a core with taskset(1) before it starts, so that it creates threads for one core."""
    return ["taskset", "--cpu-list", str(core), *command]
