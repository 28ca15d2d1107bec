"""Programs that read all formats of a volume, and connect by mutual TLS with them where the program supports the key.

Each returns the serial numbers of the certificates that it has seen. The files have the names of :data:`NAMES`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key, pkcs12

from csi_driver.core.formats.registry import FORMATS
from csi_driver.core.spec import KeyType
from tests.peers.processes import LOOPBACK
from tests.support.requirements import openssl_for, require_program

ATTRIBUTES = {"files": "java", **{each.attribute: each.example for each in FORMATS}}
"""All formats at the same time, except for keys that cannot be in PKCS#12: see :func:`attributes_for`."""
STORES = ("keystore-file", "truststore-file", "password-file")
_SOURCES = Path(__file__).parent / "formats"
_TIMEOUT_S = 60


def attributes_for(kind: KeyType) -> dict[str, str]:
    if not kind.value.startswith("ML-DSA"):
        return ATTRIBUTES
    return {
        "files": "kubernetes",
        **{name: file for name, file in ATTRIBUTES.items() if name not in ("files", *STORES)},
    }


def serial_in(directory: Path) -> str:
    summary = json.loads((directory / "generation.json").read_bytes())
    return str(summary["serial"])


def run(*command: str | Path, stdin: str = "") -> str:
    arguments = list(map(str, command))
    done = subprocess.run(arguments, input=stdin, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def openssl(directory: Path, kind: KeyType, *, stores: bool) -> set[str]:
    """Read each file with the openssl command. All keys must be that of the certificate."""
    program, serials = openssl_for(kind), set()
    for name, form in (("tls.crt", "PEM"), ("tls.pem", "PEM"), ("tls.der", "DER")):
        printed = run(program, "x509", "-in", directory / name, "-inform", form, "-noout", "-serial", "-pubkey")
        serial, _, public = printed.partition("\n")
        serials.add(serial)
        for key, key_form in (("tls.key", "PEM"), ("tls.pem", "PEM"), ("tls.key.der", "DER")):
            assert run(program, "pkey", "-in", directory / key, "-inform", key_form, "-pubout") == public
    chain: list[str | Path] = [program, "verify", "-CAfile", directory / "ca.crt", "-untrusted", directory / "tls.crt"]
    run(*chain, directory / "tls.crt")
    if stores:
        password = ["-passin", f"file:{directory / 'keystore.password'}"]
        opened = run(program, "pkcs12", "-in", directory / "keystore.p12", *password, "-noenc")
        serials.add(run(program, "x509", "-noout", "-serial", stdin=opened).strip())
        roots = run(program, "pkcs12", "-in", directory / "truststore.p12", *password, "-nokeys")
        assert roots.count("BEGIN CERTIFICATE") == (directory / "ca.crt").read_text().count("BEGIN CERTIFICATE")
    return {serial.removeprefix("serial=").lower().lstrip("0") for serial in serials}


def python(directory: Path, *, stores: bool) -> set[str]:
    """Read each file with the package cryptography. All keys must be that of the certificate."""
    read = {path.name: path.read_bytes() for path in directory.iterdir() if not path.is_dir()}
    leaf = x509.load_der_x509_certificate(read["tls.der"])
    keys = [load_pem_private_key(read[name], None) for name in ("tls.key", "tls.pem")]
    keys.append(load_der_private_key(read["tls.key.der"], None))
    leaves = [x509.load_pem_x509_certificates(read[name])[0] for name in ("tls.crt", "tls.pem")]
    roots = x509.load_pem_x509_certificates(read["ca.crt"])
    if stores:
        store = pkcs12.load_pkcs12(read["keystore.p12"], read["keystore.password"])
        assert store.cert is not None
        assert store.key is not None
        keys.append(store.key)
        leaves.append(store.cert.certificate)
        trusted = pkcs12.load_pkcs12(read["truststore.p12"], read["keystore.password"]).additional_certs
        assert [entry.certificate for entry in trusted] == roots
    assert all(each == leaf for each in leaves)
    assert all(key.public_key() == leaf.public_key() for key in keys)
    return {f"{leaf.serial_number:x}"}


def keytool(directory: Path) -> set[str]:
    """List both stores as an administrator does. Return the serial number of the key's certificate."""
    listing: list[str | Path] = [
        require_program("keytool"),
        "-list",
        "-v",
        "-storepass:file",
        directory / "keystore.password",
        "-keystore",
    ]
    keys, roots = run(*listing, directory / "keystore.p12"), run(*listing, directory / "truststore.p12")
    assert "Keystore type: PKCS12" in keys
    assert "Alias name: certmount" in keys
    assert keys.count("Entry type: PrivateKeyEntry") == 1
    trusted = (directory / "ca.crt").read_text().count("BEGIN CERTIFICATE")
    assert roots.count("Entry type: trustedCertEntry") == trusted
    line = next(line for line in keys.splitlines() if line.startswith("Serial number: "))
    return {line.removeprefix("Serial number: ").lower()}


def node(directories: Sequence[Path]) -> dict[Path, set[str]]:
    """Connect with PEM (server) and PKCS#12 (client), and read DER."""
    lines = run(require_program("node"), _SOURCES / "formats.js", *directories).splitlines()
    return {Path(seen["directory"]): set(seen["seen"]) for seen in map(json.loads, lines)}


def go(directories: Sequence[Path]) -> dict[Path, set[str]]:
    """Connect with PEM, the bundle, PKCS#12 and DER as server and client."""
    seen = json.loads(run(_go_program(), *directories))
    return {Path(directory): set(serials) for directory, serials in seen.items()}


@contextlib.asynccontextmanager
async def java_servers(directories: Sequence[Path]) -> AsyncIterator[dict[Path, tuple[int, str, int]]]:
    """Serve TLS with the stores of each directory. Yields the port, the serial number and the number of trusted roots."""
    command = [require_program("java"), "-cp", str(_java_classes()), "Formats", *map(str, directories)]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        found: dict[Path, tuple[int, str, int]] = {}
        async with asyncio.timeout(_TIMEOUT_S):
            while (line := (await process.stdout.readline()).decode().split()) != ["ready"]:
                assert line, "the Java program ended"
                found[Path(line[0])] = int(line[1]), line[2], int(line[3])
        yield found
    finally:
        process.kill()
        await process.wait()


async def ask_java(port: int, directory: Path) -> tuple[str, str]:
    """Connect by mutual TLS with Python and the PEM files. Return the serial number that each side sees of the other."""
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    context.load_cert_chain(directory / "tls.pem")
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context, server_hostname="localhost")
        certificate = writer.get_extra_info("peercert")
        seen = (await reader.read()).decode()
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # Java closes without waiting
            await writer.wait_closed()
    return certificate["serialNumber"].lower().lstrip("0"), seen


def java_keys(directories: Sequence[Path]) -> dict[Path, bool]:
    """Return for each directory whether Java's own API reads the key in DER."""
    lines = run(require_program("java"), "-cp", _java_classes(), "PrivateKeys", *directories).splitlines()
    return {Path(directory): result == "read" for directory, result in map(str.split, lines)}


def _go_program() -> Path:
    program, sources = require_program("go"), _SOURCES / "go"
    with _built("formats-go", sorted(sources.iterdir()), "formats") as (built, target):
        if target is not None:
            environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
            subprocess.run([program, "build", "-o", target, "."], cwd=sources, check=True, env=environment)
    return built


def _java_classes() -> Path:
    program, sources = require_program("javac"), [_SOURCES / "Formats.java", _SOURCES / "PrivateKeys.java"]
    with _built("formats-java", sources, "classes") as (built, target):
        if target is not None:
            subprocess.run([program, "-d", target, *sources], check=True)
    return built


@contextlib.contextmanager
def _built(name: str, sources: Sequence[Path], output: str) -> Iterator[tuple[Path, Path | None]]:
    """Yield where a program is, and where to build it unless it was built from the same sources before."""
    mark = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    cache = Path(os.environ.get("CERTMOUNT_CACHE") or Path.home() / ".cache" / "certmount")
    directory = cache / f"{name}-{mark}"
    if (directory / output).exists():
        yield directory / output, None
        return
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f".{output}.{os.getpid()}"
    yield directory / output, target
    with contextlib.suppress(OSError):  # another process was faster
        target.rename(directory / output)
