"""``certmount ca`` as an administrator uses it, with a directory and in a cluster."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from prometheus_client import CollectorRegistry

from csi_driver import DRIVER_NAME
from csi_driver.authority.ca.authority import CertificateAuthority, utc_now
from csi_driver.authority.ca.keyring import INTERMEDIATE, INTERMEDIATE_KEY, ROOT, Keyring, encode_keyring, make_keyring
from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.storage import DirectoryStore
from csi_driver.authority.trust.acknowledgements import ACKNOWLEDGEMENTS_FILE, node_hash
from csi_driver.cli.ca import command
from csi_driver.core.formats.pem import fingerprint
from csi_driver.kube.connection import ApiConfiguration
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.kube.api_server import FakeApiServer
from tests.unit.kube.collection import Collection


class OneNode:
    """One node, which has acknowledged everything."""

    async def read(self, generation: int) -> Acknowledgements:
        assert generation
        return Acknowledgements(frozenset({"one"}), frozenset({"one"}))


class Setting:
    """A directory with a CA, an authority whose clock a test can advance, and the command."""

    def __init__(self, folder: Path, nodes: OneNode | None = None) -> None:
        self.folder = folder
        self.ahead = timedelta()
        metrics = AuthorityMetrics(CollectorRegistry())
        self.ca = CertificateAuthority(
            StoredCA(DirectoryStore(folder), nodes),
            metrics,
            self._clock,
            elapsed=lambda: time.monotonic() + self.ahead.total_seconds(),
        )

    def _clock(self) -> datetime:
        return utc_now() + self.ahead

    def refresh_after(self, seconds: int = 0) -> Keyring:
        """Let time pass and the authority refresh a few times, so that it reads a phase and makes the next transition."""
        self.ahead += timedelta(seconds=seconds)
        for _ in range(4):
            asyncio.run(self.ca.refresh())
        return self.ca.current

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(command, [arguments[0], f"--ca-dir={self.folder}", *arguments[1:]])

    def output(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    def error(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.exit_code != 0, result.output
        return " ".join(result.output.split())

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.output("status", "-o", "json"))
        return document


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the logging of the test process unchanged."""
    monkeypatch.setattr("csi_driver.cli.ca.configure_logging", lambda _level: None)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    setting = Setting(tmp_path, OneNode())
    setting.refresh_after()
    return setting


def test_status_describes_each_phase_of_a_rotation(setting: Setting) -> None:
    old = setting.refresh_after()
    assert "steady: one CA signs" in setting.output("status")
    assert fingerprint(old.root) in setting.output("status")
    output = setting.output("rotate")
    assert "Rotation started. Pods keep working" in output
    assert "within seconds an authority reads this phase" in output
    setting.refresh_after()
    assert "every replica knows the next CA, and nodes start to acknowledge its root" in setting.output("status")
    assert setting.status()["phase"] == "announcing"
    next_root = setting.status()["next"]["roots"][0]["fingerprint"]
    new = setting.refresh_after(41)
    assert fingerprint(new.root) == next_root
    setting.refresh_after()
    status = setting.status()
    assert (status["phase"], status["next"]) == ("retiring", None)
    assert [each["root"] for each in status["retired"]] == [fingerprint(old.root)]
    assert "nodes remove the former root from every root.crt" in setting.output("status")
    setting.refresh_after(41)
    assert setting.status()["phase"] == "steady"
    assert fingerprint(old.root) not in setting.output("status")


def test_rotation_can_be_stopped_and_resumed(setting: Setting) -> None:
    setting.output("rotate")
    assert "is already in progress; nothing changed" in setting.output("rotate")
    assert "The rotation is stopped." in setting.output("stop")
    setting.refresh_after(3600)
    assert setting.status()["phase"] == "announcing"
    hint = "to resume, run: certmount ca rotate; to abandon the next CA, run: certmount ca stop --discard"
    assert hint in setting.output("status")
    assert "Rotation resumed." in setting.output("rotate")
    setting.refresh_after(41)
    assert setting.status()["phase"] == "retiring"


def test_next_ca_can_be_discarded_until_it_signs(setting: Setting) -> None:
    old = setting.refresh_after()
    setting.output("rotate")
    assert "It has signed nothing" in setting.output("stop", "--discard")
    assert setting.refresh_after().roots == old.roots
    assert "no rotation is in progress" in setting.error("stop")
    assert "no rotation is in progress" in setting.error("stop", "--discard")
    setting.output("rotate")
    setting.refresh_after()
    setting.refresh_after(41)
    assert "pods have certificates that only its root verifies" in setting.error("stop", "--discard")
    assert "is stopped" in setting.output("stop")


def test_former_root_can_be_dropped_when_every_replica_knows_the_new_ca(setting: Setting) -> None:
    old = setting.refresh_after()
    assert "no root is retired" in setting.error("drop", "--yes")
    asyncio.run(setting.ca.record_lifetime(timedelta(days=1)))
    setting.output("rotate")
    setting.refresh_after()
    setting.refresh_after(41)
    assert "retry in 40 s" in setting.error("drop", "--yes")
    assert "Aborted" in setting.error("drop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csi_driver.cli.ca.time.time", (utc_now() + timedelta(seconds=120)).timestamp)
        assert "remove the former root from every root.crt within seconds" in setting.output("drop", "--yes")
    setting.refresh_after()
    assert old.roots_der[0] not in setting.ca.root_set.roots
    assert setting.status()["phase"] == "steady"


def test_next_ca_inherits_what_no_option_changes(setting: Setting) -> None:
    """A rotation must not remove name constraints."""
    setting.output("rotate", "--permit", "DNS:example.com", "--key-type", "Ed25519", "--path-length", "2")
    setting.refresh_after()
    first = setting.refresh_after(41)
    constraints = first.root.extensions.get_extension_for_class(x509.NameConstraints).value
    setting.refresh_after(100)
    assert setting.status()["phase"] == "steady"
    setting.output("rotate")
    setting.refresh_after()
    second = setting.refresh_after(41)
    assert second.root != first.root
    assert second.root.extensions.get_extension_for_class(x509.NameConstraints).value == constraints
    assert type(second.root.public_key()) is type(first.root.public_key())
    assert "to abandon it, run: certmount ca stop --discard" in setting.error("rotate", "--key-type", "Ed25519")


def own_ca(folder: Path, *, encrypted: bool) -> tuple[Keyring, list[str]]:
    keyring = make_keyring(utc_now())
    for name, value in encode_keyring(keyring).items():
        (folder / name).write_bytes(value.reveal())
    options = [
        f"--{name.replace('.crt', '').replace('.', '-')}={folder / name}"
        for name in (ROOT, INTERMEDIATE, INTERMEDIATE_KEY)
    ]
    if encrypted:
        encryption = BestAvailableEncryption(b"secret")
        key = keyring.intermediate.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        (folder / INTERMEDIATE_KEY).write_bytes(key)
        (folder / "password").write_bytes(b"secret\n")
        options.append(f"--password-file={folder / 'password'}")
    return keyring, options


@pytest.mark.parametrize("encrypted", [False, True])
def test_rotation_to_an_own_ca(encrypted: bool, setting: Setting, tmp_path_factory: Any) -> None:
    keyring, options = own_ca(tmp_path_factory.mktemp("own"), encrypted=encrypted)
    assert "you must renew it" in setting.output("rotate", *options)
    setting.refresh_after()
    held = setting.refresh_after(41)
    assert (held.roots, held.root_key) == (keyring.roots, None)
    assert held.intermediate.certificate == keyring.intermediate.certificate


def test_invalid_own_ca_is_rejected_and_starts_no_rotation(setting: Setting, tmp_path: Path) -> None:
    _, options = own_ca(tmp_path, encrypted=True)
    assert "your own CA also requires --intermediate, --intermediate-key" in setting.error("rotate", options[0])
    assert "--path-length apply to a new CA" in setting.error("rotate", *options, "--path-length=2")
    assert "see --root" in setting.error("rotate", options[-1])
    (tmp_path / "password").write_text("wrong")
    assert "next intermediate.key" in setting.error("rotate", *options)
    assert "Invalid value for '--permit'" in setting.error("rotate", "--permit", "everything")
    assert setting.status()["phase"] == "steady"


def test_commands_fail_without_a_ca_and_create_none(tmp_path: Path) -> None:
    for arguments in (["status"], ["rotate"], ["stop"]):
        assert "contains no CA" in Setting(tmp_path).error(*arguments)
    assert not (tmp_path / "ca.json").exists()


def test_exactly_one_option_selects_the_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    runner = CliRunner()
    assert "--ca-dir: required outside a cluster" in runner.invoke(command, ["status"]).output
    both = runner.invoke(command, ["status", f"--ca-dir={tmp_path}", "--ca-secret=a/b"])
    assert "use one of them" in both.output
    assert "'b' is not NAMESPACE/NAME" in runner.invoke(command, ["status", "--ca-secret=b"]).output


async def test_status_in_a_cluster_names_missing_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    await asyncio.to_thread(setting.refresh_after)
    await asyncio.to_thread(setting.output, "rotate")
    for seconds in (0, 41):
        await asyncio.to_thread(setting.refresh_after, seconds)
    stored = await DirectoryStore(tmp_path).load()
    server = FakeApiServer()
    data = {name: base64.b64encode(value.reveal()).decode() for name, value in stored.values.items()}
    server.objects["secrets/certmount-ca"]["data"] = data
    document = json.dumps({"set": "internal", "nodes": {node_hash("updating"): 1, node_hash("gone"): 1}})
    known = server._object("Secret", "certmount-acknowledgements")
    known["data"] = {ACKNOWLEDGEMENTS_FILE: base64.b64encode(document.encode()).decode()}
    server.objects["secrets/certmount-acknowledgements"] = known
    nodes = server.collections["/apis/storage.k8s.io/v1/csinodes"] = Collection("CSINode")
    for number in range(12):
        nodes.put({"metadata": {"name": f"node-{number:02}"}, "spec": {"drivers": [{"name": DRIVER_NAME}]}})
    nodes.put({"metadata": {"name": "updating"}, "spec": {"drivers": None}})
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    async with server.running():
        configuration = ApiConfiguration(url=server.url)
        monkeypatch.setattr("csi_driver.kube.connection.in_cluster_configuration", lambda: configuration)

        async def output(*arguments: str) -> str:
            result = await asyncio.to_thread(CliRunner().invoke, command, list(arguments))
            assert result.exit_code == 0, result.output
            return result.output

        status = await output("status")
        assert "acknowledged  by 0 of 13 nodes" in status
        assert "not yet: node-00" in status
        assert "node-10" not in status
        assert "and 3 more" in status
        assert await output("forget", "updating", "strange") == (
            "updating: forgotten\nstrange: unknown; it has never acknowledged any roots\n"
        )
        assert "acknowledged  by 0 of 12 nodes" in await output("status")
