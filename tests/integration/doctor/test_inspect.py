"""``certmount inspect``: volumes that a real driver published, and directories in which something is wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import PrivateFormat, pkcs12

from csi_driver.core.certificates.keys import PrivateKey, encode_key, generate_key
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from tests.integration.doctor.test_status import published
from tests.integration.doctor.world import NODE, Installation, Result, TestPod
from tests.support.requirements import require_root
from tests.support.scripted_authority import TestCA

pytestmark = pytest.mark.asyncio(loop_scope="package")
ACCEPTED = [
    "a client that connects to api.example.com accepts it",
    "a server that requires a client certificate accepts it",
]
NAMES = Names.of([DNSName.parse("api.example.com")])


async def inspect(installation: Installation, *arguments: str | Path) -> Result:
    return await asyncio.to_thread(installation.run, "inspect", *map(str, arguments))


@pytest.mark.parametrize(
    "attributes, kinds",
    [
        ({}, ["summary", "certificates", "certificates", "private key", "key and certificates"]),
        ({"files": "kubernetes", "key_type": "RSA-2048"}, ["certificates", "summary", "certificates", "private key"]),
        ({"files": "java"}, ["summary", "key store (PKCS#12)", "password", "trust store (PKCS#12)"]),
        ({"files": "credential-bundle", "ca_file": "ca.pem"}, ["certificates", "key and certificates", "summary"]),
        (
            {"certificate_der_file": "tls.der", "key_der_file": "tls.key.der", "key_type": "EC-P384"},
            ["summary", "certificates", "certificates", "private key", "key and certificates", "certificate (DER)",
             "private key (DER)"],
        ),
    ],
    ids=["autocert", "kubernetes", "java", "credential-bundle", "der"],
)  # fmt: skip
async def test_each_format_of_a_healthy_volume(
    installation: Installation, attributes: dict[str, str], kinds: list[str]
) -> None:
    async with published(installation, "edge-0", dns_names="api.example.com", **attributes) as (path,):
        result = await inspect(installation, path)
        assert (result.status, result.errors) == (0, ""), result.output
        lines = result.output.splitlines()
        assert lines[0].startswith(f"{path} (generation 2")
        assert lines[2] == "FILE\tMODE\tOWNER\tCONTENT\tSTATE"
        rows = [line.split("\t") for line in lines[3 : lines.index("", 3)]]
        assert [row[3] for row in rows] == kinds
        assert {row[4] for row in rows} == {"ok"}
        assert lines[-2:] == ACCEPTED
        for file in path.glob("[!.]*"):
            content = file.read_bytes()
            if b"PRIVATE KEY" in content or "password" in file.name:
                assert content.splitlines()[-2 if b"-----" in content else 0].decode() not in result.output


async def test_output_for_scripts(installation: Installation) -> None:
    async with published(installation, "edge-0", dns_names="api.example.com") as (path,):
        document = (await inspect(installation, path, "-o", "json", "--name=other.example.com")).document
        leaf = document["certificate"]
        assert set(document) == {
            "directory", "generation", "files", "certificate", "intermediates", "roots", "verdicts", "problems",
        }  # fmt: skip
        assert leaf["names"] == ["api.example.com", "spiffe://cluster.local/ns/web/sa/edge"]
        assert (leaf["keyType"], leaf["usages"]) == ("EC-P256", ["server", "client"])
        assert document["files"][0] == {
            "name": "generation.json", "kind": "summary", "mode": "0444", "uid": os.getuid(), "gid": os.getgid(),
            "certificates": 0, "problem": "",
        }  # fmt: skip
        problem = "Hostname mismatch, certificate is not valid for 'other.example.com'"
        server = {"peer": "a client that connects to other.example.com", "accepts": False, "problem": problem}
        client = {"peer": "a server that requires a client certificate", "accepts": True, "problem": ""}
        assert document["verdicts"] == [server, client]
        assert document["problems"] == [
            f"a client that connects to other.example.com rejects the certificate: {problem}"
        ]


async def test_certificate_for_servers_only(installation: Installation) -> None:
    async with published(installation, "edge-0", dns_names="api.example.com", usages="server") as (path,):
        result = await inspect(installation, path)
    assert result.status == 1
    assert "a server that requires a client certificate rejects it: unsuitable certificate purpose" in result.output


Volume = dict[str, bytes]


def volume(ca: TestCA, key: PrivateKey, lifetime: timedelta = timedelta(hours=1)) -> Volume:
    leaf = ca.sign(key.public_key(), NAMES, lifetime)
    return {"tls.crt": encode_certificates([leaf]), "tls.key": encode_key(key).reveal(), "ca.crt": ca.pem}


def store(iterations: int) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = TestCA().sign(key.public_key(), NAMES, timedelta(hours=1))
    encryption = PrivateFormat.PKCS12.encryption_builder().kdf_rounds(iterations).hmac_hash(SHA256()).build(b"secret")
    return pkcs12.serialize_key_and_certificates(b"", key, leaf, None, encryption)


def _other_key(files: Volume) -> Volume:
    return {**files, "tls.key": encode_key(generate_key(KeyType.EC_P256)).reveal()}


def _self_signed(_: Volume) -> Volume:
    """Return what `openssl req -x509` writes: one certificate, which is a CA, and its key."""
    ca = TestCA()
    return {"tls.crt": ca.pem, "tls.key": encode_key(ca.key).reveal()}


def _expired(_: Volume) -> Volume:
    return volume(TestCA(), generate_key(KeyType.EC_P256), timedelta(seconds=-30))


@pytest.mark.parametrize(
    "change, expected",
    [
        (_other_key, "tls.key: the private key does not match the certificate"),
        (_self_signed, "the leaf is a CA certificate"),
        (lambda files: _other_key(_self_signed(files)), "tls.key: the private key matches no certificate"),
        (_expired, "chain[0] expired at "),
        (lambda files: {**files, "ca.crt": TestCA().pem}, "the chain does not end at a trusted root"),
        (lambda files: {**files, "roots.pem": TestCA().pem}, "has other roots than the other files"),
        (lambda files: {"tls.crt": files["tls.crt"]}, "the directory has no root certificates, so nothing verifies the chain"),
        (lambda _: {"README": b"text"}, "the directory has no certificates"),
        (lambda files: {**files, "tls.crt": b"-----BEGIN CERTIFICATE-----\nx"}, "tls.crt: has a certificate that is not valid"),
        (lambda files: {**files, "tls.key": b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----"}, "tls.key: has a private key that is encrypted or not valid"),
        (lambda files: {**files, "tls.key": files["tls.key"][:90]}, "tls.key: has no complete certificate or private key"),
        (lambda files: {**files, "generation.json": b'{"serial": "1"}'}, "generation.json: describes the certificate 1, but "),
        (lambda files: {**files, "generation.json": b'{"roots_sha256": [{}]}'}, "describes other roots than the files have"),
        (lambda files: {**files, "generation.json": b'{"roots_sha256": 1}'}, "describes other roots than the files have"),
        (lambda files: {**files, "generation.json": b"[" * 5000}, "generation.json: is not a valid JSON object"),
        (lambda files: {**files, "store.p12": store(1000)}, "nor a key store that a known password opens"),
        (lambda files: {**files, "large": b"x" * (1 << 21)}, "large: has more than 1048576 bytes"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_a_directory(
    installation: Installation, tmp_path: Path, change: Callable[[Volume], Volume], expected: str
) -> None:
    files = volume(TestCA(), generate_key(KeyType.EC_P256))
    for name, content in change(files).items():
        (tmp_path / name).write_bytes(content)
    result = await inspect(installation, tmp_path)
    assert expected in result.output, result.output + result.errors
    assert result.status == 1


async def test_healthy_directory_without_generations(installation: Installation, tmp_path: Path) -> None:
    """For example the mount of a Secret, or a copy of a volume."""
    for name, content in volume(TestCA(), generate_key(KeyType.ED25519)).items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("missing")
    result = await inspect(installation, tmp_path)
    assert (result.status, result.output.splitlines()[-2:]) == (0, ACCEPTED)


@pytest.mark.parametrize(
    "name, problem",
    [
        ("", "the name is empty"),
        ("a..b", "the name is not a DNS name or an IP address"),
        ("a\nb", "Hostname mismatch, "),
    ],
)
async def test_name_that_no_client_can_use(installation: Installation, tmp_path: Path, name: str, problem: str) -> None:
    for file, content in volume(TestCA(), generate_key(KeyType.EC_P256)).items():
        (tmp_path / file).write_bytes(content)
    result = await inspect(installation, tmp_path, f"--name={name}")
    shown = name.replace("\n", "\\n")
    assert f"a client that connects to {shown} rejects it: {problem}" in result.output
    assert result.status == 1


async def test_names_that_certmount_does_not_issue(installation: Installation, tmp_path: Path) -> None:
    ca, key = TestCA(), generate_key(KeyType.EC_P256)
    names = [x509.DNSName("my_host.example.com"), x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))]
    now = datetime.now(UTC)
    subject = x509.Name([])
    builder = x509.CertificateBuilder(ca.certificate.subject, subject, key.public_key(), 1)
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    leaf = builder.add_extension(x509.SubjectAlternativeName(names), critical=True).sign(ca.key, SHA256())
    files = {"tls.crt": encode_certificates([leaf]), "tls.key": encode_key(key).reveal(), "ca.crt": ca.pem}
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    result = await inspect(installation, tmp_path)
    assert "names         my_host.example.com, (RegisteredID)\n" in result.output
    assert "a client that connects to my_host.example.com accepts it\n" in result.output


async def test_password_of_a_key_store(installation: Installation, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v/store.p12").write_bytes(store(1000))
    (tmp_path / "password").write_text("secret\n")
    result = await inspect(installation, tmp_path / "v", f"--password-file={tmp_path}/password")
    assert "store.p12\t0644" in result.output
    assert "key store (PKCS#12)\tok" in result.output
    assert "secret" not in result.output


async def test_key_store_that_takes_years_is_not_read(installation: Installation, tmp_path: Path) -> None:
    """The number of iterations is a field of the file: here it is replaced by the largest one."""
    content, rounds = store(65_537), (65_537).to_bytes(3, "big")
    assert content.count(b"\x02\x03" + rounds) == 2
    (tmp_path / "store.p12").write_bytes(content.replace(b"\x02\x03" + rounds, b"\x02\x03" + b"\x7f\xff\xff"))
    (tmp_path / "password").write_text("secret")
    result = await inspect(installation, tmp_path)
    assert "key store" in result.output + result.errors
    assert result.status == 1


@pytest.mark.parametrize("given, expected", [("resource.RLIM_INFINITY", (20, 23)), ("21", (20, 21)), ("10", (10, 10))])
async def test_limit_of_the_cpu_time(given: str, expected: tuple[int, int]) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_CPU, ({given}, {given}))"
    show = "print(resource.getrlimit(resource.RLIMIT_CPU))"
    done = await asyncio.to_thread(_python, f"{limit}; inspect._limit_cpu(); {show}")
    assert done.stdout == f"{expected}\n"


async def test_kernel_ends_a_call_of_a_library_that_takes_long() -> None:
    """The handler of the signal runs only between two instructions of Python."""
    limit = "inspect._MAX_CPU_S = inspect._KILLED_AFTER_S = 1; inspect._limit_cpu()"
    derive = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    done = await asyncio.to_thread(_python, f"{limit}; {derive}")
    assert done.returncode == -signal.SIGKILL


def _python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"from csi_driver.cli import inspect; {code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


async def test_files_that_the_user_cannot_read(installation: Installation, tmp_path: Path) -> None:
    require_root()
    directory = tmp_path / "v"
    directory.mkdir()
    for name, content in volume(TestCA(), generate_key(KeyType.EC_P256)).items():
        (directory / name).write_bytes(content)
    (directory / "tls.key").chmod(0o400)
    for parent in (directory, *directory.parents):
        if str(parent).startswith("/tmp/") and parent != Path("/tmp"):
            parent.chmod(0o755)
    program = shutil.which("setpriv")
    assert program is not None
    command = [program, "--reuid=65534", "--regid=65534", "--clear-groups"]
    kubelet = tmp_path / "kubelet"  # as /var/lib/kubelet, which only root can read
    kubelet.mkdir(mode=0o700)
    arguments = (str(directory), f"--kubelet-dir={kubelet}")
    result = await asyncio.to_thread(installation.run, "inspect", *arguments, within=command)
    assert "tls.key: cannot be read: Permission denied" in result.output
    denied = await asyncio.to_thread(installation.run, "inspect", str(kubelet), within=command)
    problem = f"{kubelet} cannot be read: Permission denied; run the command as root"
    assert (denied.status, denied.errors) == (1, f"Error: VolumeNotFound: DIR: {problem}\n")
    assert "no handshake was tested; it needs the certificate, its private key" in result.output


@pytest.mark.parametrize(
    "argument, error",
    [
        ("missing", "'missing' is neither a directory nor NAMESPACE/POD"),
        ("/missing", "VolumeNotFound: DIR: /missing cannot be read: No such file or directory"),
        ("web/missing", "VolumeNotFound: pod web/missing: does not exist"),
        (
            "certmount/certmount-authority-0",
            "pod certmount/certmount-authority-0: has no volume of the driver csi.certmount.dev",
        ),
    ],
)
async def test_arguments_that_are_no_volume(installation: Installation, argument: str, error: str) -> None:
    result = await inspect(installation, argument)
    assert result.status != 0
    assert error in result.errors


def pod_object(pod: TestPod) -> dict[str, Any]:
    csi = {"driver": "csi.certmount.dev", "readOnly": True, "volumeAttributes": {"dns-names": "api.example.com"}}
    return {
        "metadata": {"name": pod.name},
        "spec": {
            "serviceAccountName": pod.service_account,
            "nodeName": NODE,
            "containers": [{"name": "app", "image": "app"}],
            "volumes": [{"name": "tls", "csi": csi}],
        },
    }


async def test_pod_with_its_events_the_state_on_its_node_and_its_files(installation: Installation) -> None:
    api, namespace = installation.api, "/api/v1/namespaces/web"
    api.call("POST", "/api/v1/namespaces", {"metadata": {"name": "web"}})
    api.call("POST", f"{namespace}/serviceaccounts", {"metadata": {"name": "edge"}})
    pod = TestPod("web", "edge-0", "edge", issuer=installation.issuer)
    uid = api.call("POST", f"{namespace}/pods", pod_object(pod))["metadata"]["uid"]
    pod = TestPod("web", "edge-0", "edge", uid, issuer=installation.issuer)
    event = {
        "metadata": {"generateName": "e-"},
        "involvedObject": {"kind": "Pod", "name": "edge-0", "namespace": "web"},
        "type": "Warning",
        "reason": "RenewalFailing",
        "message": "the renewal failed",
        "lastTimestamp": "2026-11-27T02:00:00Z",
    }
    api.call("POST", f"{namespace}/events", event)
    before = await inspect(installation, "web/edge-0")
    assert before.status == 1
    assert before.output.splitlines() == [
        f"pod web/edge-0 on {NODE}, service account edge, Pending",
        "volume tls",
        "  dns-names: api.example.com",
        "event 2026-11-27T02:00:00Z Warning RenewalFailing: the renewal failed",
        "problem: volume tls: the driver has not published it; see the events",
    ]
    await installation.publish(pod, {"dns-names": "api.example.com"})
    try:
        result = await inspect(installation, "web/edge-0", f"--kubelet-dir={installation.driver_kubelet.root}")
        assert (result.status, result.errors) == (0, "")
        assert f"  {ACCEPTED[0]}\n" in result.output
        document = (await inspect(installation, "web/edge-0", "-o", "json")).document
        (found,) = document["volumes"]
        assert found["certificate"]["names"] == ["api.example.com", "spiffe://cluster.local/ns/web/sa/edge"]
        assert found["files"] is None
        assert document["problems"] == []
        assert found["certificate"]["serial"] in result.output
    finally:
        await installation.unpublish(pod)
