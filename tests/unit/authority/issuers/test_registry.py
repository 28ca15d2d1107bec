"""The issuers file: what the parser accepts, and how the registry follows the file."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest, registry
from csi_driver.authority.issuers.dependencies import CredentialReader, IssuerDependencies, IssuerKind
from csi_driver.authority.issuers.kinds import ISSUER_KINDS, read_issuers
from csi_driver.authority.issuers.registry import IssuerRegistry
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.core.config.document_reader import DocumentReader
from csi_driver.core.config.document_reader import Path as DocumentPath
from csi_driver.core.config.issuers import FileSource, SecretSource
from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret
from tests.support.json_schema import places
from tests.support.waiting import until
from tests.unit.authority.issuers.schema import DOCS, SCHEMA, assert_schema_agrees

VALID: dict[str, Any] = {
    "issuers": [
        {
            "name": "step",
            "step_ca": {
                "url": "https://ca.example.com:9000",
                "root_sha256": ":".join(["AB"] * 32),
                "provisioner": "csi",
                "key": {"secret": "certmount/step-provisioner", "key": "jwk"},
                "password": {"file": "/etc/certmount/password"},
            },
        },
        {
            "name": "other-step",
            "step_ca": {
                "url": "https://[fd00::1]/",
                "root": {"file": "/etc/root.crt"},
                "provisioner": "admin@example.com",
                "password": {"secret": "certmount/autocert-password", "key": "password"},
            },
        },
    ]
}


def test_file_is_parsed_into_normalized_values() -> None:
    step, other = read_issuers(yaml.safe_dump(VALID).encode())
    assert (step.name, step.kind) == ("step", "step_ca")
    assert step.configuration == StepCAConfiguration(
        url="https://ca.example.com:9000",
        provisioner="csi",
        root_sha256="ab" * 32,
        key=SecretSource("certmount", "step-provisioner", "jwk"),
        password=FileSource("/etc/certmount/password"),
    )
    assert isinstance(other.configuration, StepCAConfiguration)
    assert (other.configuration.url, other.configuration.root_file) == ("https://[fd00::1]", "/etc/root.crt")


@pytest.mark.parametrize("text", ["", "# none yet\n", "issuers:\n", "issuers: []\n"])
def test_empty_file_declares_no_issuers(text: str) -> None:
    assert read_issuers(text.encode()) == ()


def test_all_faults_are_reported_together_with_their_lines() -> None:
    text = """
issuers:
- name: internal
  step_ca: {url: "http://ca", provisioner: csi, root_sha256: 0123, key: hunter2}
- name: step
  stepca: {}
- name: step
  step_ca:
    url: https://ca.example.com/acme
    provisioner: csi
    root: {file: root.crt}
    root_sha256: abcd
    key: {secret: certmount/a}
- {name: x}
"""
    with pytest.raises(CertmountError) as failure:
        read_issuers(text.encode())
    faults = [str(fault) for fault in failure.value.faults]
    assert [fault.split(":")[0] for fault in faults] == [
        "issuers[0].name (line 3)",
        "issuers[0].step_ca.url (line 4)",
        "issuers[0].step_ca.root_sha256 (line 4)",
        "issuers[0].step_ca.key (line 4)",
        "issuers[1].stepca (line 6)",
        "issuers[1] (line 5)",
        "issuers[2].name (line 7)",
        "issuers[2].step_ca (line 8)",
        "issuers[2].step_ca.url (line 9)",
        "issuers[2].step_ca.root.file (line 11)",
        "issuers[2].step_ca.root_sha256 (line 12)",
        "issuers[2].step_ca.key.key (line 13)",
        "issuers[3] (line 14)",
    ]
    errors = "\n".join(faults)
    assert re.search(r"'step' .*issuers\[1\] \(line 5\)", errors)
    assert "did you mean step_ca?" in errors
    assert "hunter2" not in errors, "the log must not contain secrets"


@pytest.mark.parametrize("path", list(places(VALID)), ids=str)
def test_schema_agrees_with_the_parser(path: DocumentPath) -> None:
    assert_schema_agrees(VALID, path)


def test_schema_and_documentation_list_all_kinds() -> None:
    entry = SCHEMA["properties"]["issuers"]["items"]
    assert set(entry["properties"]) == {"name", *ISSUER_KINDS}
    assert [{"required": [kind]} for kind in ISSUER_KINDS] == entry["oneOf"]
    rows = (DOCS / "issuers.md").read_text().split("| kind | signs |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", rows, flags=re.MULTILINE) == list(ISSUER_KINDS)


@pytest.mark.parametrize("page", ["issuers.md", "from-autocert.md"])
def test_yaml_examples_in_the_documentation_are_valid(page: str) -> None:
    for block in (DOCS / page).read_text().split("```yaml\n")[1:]:
        example = block.split("```")[0]
        if example.lstrip().startswith("issuers:"):
            assert read_issuers(example.encode()), example


class FakeIssuer(Issuer):
    """Counts how often it is running; fails if its configuration is ``defect``."""

    def __init__(self, configuration: object = None) -> None:
        self.configuration = configuration
        self.known_roots: tuple[bytes, ...] = ()
        self.running = 0

    @property
    def roots(self) -> tuple[bytes, ...]:
        return self.known_roots

    async def run(self) -> None:
        self.running += 1
        try:
            if self.configuration == "defect":
                raise RuntimeError("a defect")
            await asyncio.Event().wait()
        finally:
            self.running -= 1

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        raise NotImplementedError


def parse_fake(reader: DocumentReader, path: DocumentPath, value: object) -> object:
    if value == "wrong":
        reader.fault(path, "is wrong")
    return value


@dataclass
class RegistryWorld:
    """A registry with fake issuers, its file, and what its callbacks got."""

    file: Path
    roots: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    loads: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        fake = IssuerKind(parse_fake, lambda _name, configuration, _dependencies: FakeIssuer(configuration))
        self.internal = FakeIssuer()
        self.issuers = IssuerRegistry(
            self.file,
            self.internal,
            IssuerDependencies(CredentialReader()),
            on_roots=self.roots.__setitem__,
            on_load=self.loads.append,
            on_due=lambda _: None,
            kinds={"fake": fake},
        )

    def write(self, **issuers: str) -> None:
        entries = [{"name": name, "fake": value} for name, value in issuers.items()]
        new = self.file.with_suffix(".new")
        new.write_text(yaml.safe_dump({"issuers": entries}))
        new.replace(self.file)

    def __getitem__(self, name: str) -> FakeIssuer:
        issuer = self.issuers[name]
        assert isinstance(issuer, FakeIssuer)
        return issuer

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.issuers.load()
        task = asyncio.create_task(self.issuers.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryWorld:
    monkeypatch.setattr(registry, "_INTERVAL_S", 0.01)
    return RegistryWorld(tmp_path / "issuers.yaml")


async def test_unchanged_issuers_stay_and_removed_issuers_stop(world: RegistryWorld) -> None:
    """The roots of a removed issuer are not reported again: its pods keep them."""
    world.write(a="1", b="1")
    async with world.running():
        a, b = world["a"], world["b"]
        await until(lambda: a.running == b.running == 1, "the background work")
        a.known_roots = b.known_roots = (b"root",)
        await until(lambda: set(world.roots) == {"a", "b"}, "the roots")
        world.write(b="1", c="1")
        await until(lambda: "c" in world.issuers, "the new file")
        await until(lambda: a.running == 0 and world["c"].running == 1, "the change")
        assert world["b"] is b
        assert b.running == 1
        assert list(world.issuers) == ["internal", "b", "c"]
        assert world.issuers.get("a") is None
        assert world.roots["a"] == (b"root",)
        world.write(b="2", c="1")
        await until(lambda: world["b"] is not b, "the changed declaration")
    assert b.running == world["c"].running == 0
    assert world.issuers["internal"] is world.internal


async def test_invalid_file_keeps_the_previous_issuers(world: RegistryWorld) -> None:
    """Each invalid content is logged and counted once."""
    world.write(a="1")
    async with world.running():
        with capture_logs() as logs:
            world.write(a="wrong", b="1")
            await until(lambda: world.loads == [True, False], "the invalid file")
            assert list(world.issuers) == ["internal", "a"]
            world.file.unlink()
            await until(lambda: world.loads == [True, False, False], "the missing file")
            world.write(b="1")
            await until(lambda: "b" in world.issuers, "the valid file")
    rejected = [entry["error"] for entry in logs if entry["event"].startswith("issuers file rejected")]
    assert [error.partition(": ")[2] for error in rejected] == [
        "issuers[0].fake (line 2): is wrong",
        f"{world.file}: cannot be read: No such file or directory; check --issuers",
    ]


async def test_invalid_file_prevents_the_start(world: RegistryWorld) -> None:
    world.write(a="wrong")
    with pytest.raises(CertmountError, match="is wrong"):
        await world.issuers.load()


async def test_unexpected_error_of_one_issuer_does_not_stop_others(world: RegistryWorld) -> None:
    world.write(a="defect", b="1")
    with capture_logs() as logs:
        async with world.running():
            await until(lambda: world["b"].running == 1, "the other issuer")
            await until(lambda: logs, "the log")
            assert world["b"].running == 1
    assert any(entry["event"] == "background work of issuer failed" for entry in logs)


async def test_registry_without_a_file_contains_the_internal_ca() -> None:
    internal = FakeIssuer()
    issuers = IssuerRegistry(
        None,
        internal,
        IssuerDependencies(CredentialReader()),
        on_roots=lambda *_: None,
        on_load=lambda _: None,
        on_due=lambda _: None,
    )
    await issuers.load()
    assert dict(issuers) == {"internal": internal}
    assert issuers.problems == {}


async def test_credentials_are_read_from_files_and_secrets(tmp_path: Path) -> None:
    """Errors name the source and never show the content."""
    requested: list[tuple[str, str, str]] = []

    async def read_secret(namespace: str, name: str, key: str) -> Secret[bytes]:
        requested.append((namespace, name, key))
        return Secret(b"from the cluster")

    file = tmp_path / "key"
    file.write_bytes(b"from a file")
    assert (await CredentialReader().read(FileSource(str(file)))).reveal() == b"from a file"
    in_cluster = SecretSource("certmount", "step", "jwk")
    assert (await CredentialReader(read_secret).read(in_cluster)).reveal() == b"from the cluster"
    assert requested == [("certmount", "step", "jwk")]
    with pytest.raises(CertmountError, match="cannot be read outside a cluster; store it in a file"):
        await CredentialReader().read(in_cluster)
    file.write_bytes(b"")
    with pytest.raises(CertmountError, match="is empty"):
        await CredentialReader().read(FileSource(str(file)))
    with pytest.raises(CertmountError, match="cannot be read: Is a directory"):
        await CredentialReader().read(FileSource(str(tmp_path)))
