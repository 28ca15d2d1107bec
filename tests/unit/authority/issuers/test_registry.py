"""The issuers file: what the parser accepts, and how the registry follows the file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest, registry
from csi_driver.authority.issuers.dependencies import CredentialReader, IssuerDependencies, IssuerKind
from csi_driver.authority.issuers.kinds import ISSUER_KINDS, read_issuers
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.authority.issuers.registry import IssuerRegistry
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER
from csi_driver.core.config.document_reader import DocumentReader
from csi_driver.core.config.document_reader import Path as DocumentPath
from csi_driver.core.config.issuers import FileSource, SecretSource
from csi_driver.core.errors import REASONS, CertmountError
from csi_driver.core.secret import Secret
from csi_driver.kube.permissions import SIGNER_LEASE
from tests.support.json_schema import places
from tests.support.waiting import in_background, until
from tests.unit.authority.issuers.schema import DOCS, SCHEMA, assert_schema_agrees

STEP: dict[str, Any] = {
    "url": "https://ca.example.com:9000", "root_sha256": ":".join(["AB"] * 32), "provisioner": "csi",
    "key": {"secret": "certmount/step-provisioner", "key": "jwk"}, "password": {"file": "/etc/certmount/password"},
}  # fmt: skip
OTHER: dict[str, Any] = {
    "url": "https://[fd00::1]/", "root": {"file": "/etc/root.crt"}, "provisioner": "admin@example.com",
    "password": {"secret": "certmount/autocert-password", "key": "password"},
}  # fmt: skip
VALID: dict[str, Any] = {"issuers": [{"name": "step", "step_ca": STEP}, {"name": "other-step", "step_ca": OTHER}]}


def test_file_is_parsed_into_normalized_values() -> None:
    step, other = read_issuers(yaml.safe_dump(VALID).encode())
    assert (step.name, step.kind) == ("step", "step_ca")
    assert step.configuration == StepCAConfiguration(
        url="https://ca.example.com:9000", provisioner="csi", root_sha256="ab" * 32,
        key=SecretSource("certmount", "step-provisioner", "jwk"), password=FileSource("/etc/certmount/password"),
    )  # fmt: skip
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
    errors = "\n".join(str(fault) for fault in failure.value.faults)
    assert re.findall(r"^issuers\[(\d)\]\.?([\w.]*) \(line (\d+)\):", errors, re.MULTILINE) == [
        ("0", "name", "3"), ("0", "step_ca.url", "4"), ("0", "step_ca.root_sha256", "4"), ("0", "step_ca.key", "4"),
        ("1", "stepca", "6"), ("1", "", "5"), ("2", "name", "7"), ("2", "step_ca", "8"), ("2", "step_ca.url", "9"),
        ("2", "step_ca.root.file", "11"), ("2", "step_ca.root_sha256", "12"), ("2", "step_ca.key.key", "13"),
        ("3", "", "14"),
    ]  # fmt: skip
    assert re.search(r"'step' .*issuers\[1\] \(line 5\)", errors)
    assert "did you mean step_ca?" in errors
    assert "hunter2" not in errors, "the log must not contain secrets"


@pytest.mark.parametrize("path", list(places(VALID)), ids=str)
def test_schema_agrees_with_the_parser(path: DocumentPath) -> None:
    assert_schema_agrees(VALID, path)


_CSR: dict[str, Any] = {"signer": "example.com/pods", "approve": True, "roots": {"file": "/etc/roots.crt"}}


@pytest.mark.parametrize("path", list(places({"issuers": [{"name": "csr", "kubernetes_csr": _CSR}]})), ids=str)
@pytest.mark.parametrize("signer", ["example.com/pods", CERTMOUNT_SIGNER, "kubernetes.io/kubelet-serving", "a/b"])
def test_schema_agrees_with_the_parser_for_signers_of_kubernetes(path: DocumentPath, signer: str) -> None:
    assert_schema_agrees({"issuers": [{"name": "csr", "kubernetes_csr": {**_CSR, "signer": signer}}]}, path)


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

    roots: tuple[bytes, ...] = ()
    environment = ""

    def __init__(self, configuration: object = None) -> None:
        self.configuration = configuration
        self.running = 0

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
        self.internal = FakeIssuer()
        self.issuers = self.registry(self.file)

    def registry(self, file: Path | None) -> IssuerRegistry:
        fake = IssuerKind(parse_fake, lambda _name, configuration, _dependencies: FakeIssuer(configuration))
        return IssuerRegistry(
            file, self.internal, IssuerDependencies(CredentialReader()), on_roots=self.roots.__setitem__,
            on_load=self.loads.append, on_due=lambda *_: None, kinds={"fake": fake},
        )  # fmt: skip

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
        async with in_background(self.issuers.run()):
            yield


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
        a.roots = b.roots = (b"root",)
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


async def test_registry_without_a_file_contains_the_internal_ca(world: RegistryWorld) -> None:
    issuers = world.registry(None)
    await issuers.load()
    assert dict(issuers) == {"internal": world.internal}
    assert issuers.problems == {}


async def test_credentials_are_read_from_files_and_secrets(tmp_path: Path) -> None:
    """Errors name the source and never show the content."""
    requested: list[tuple[str, str]] = []

    async def read_secret(namespace: str, name: str) -> Mapping[str, Secret[bytes]]:
        requested.append((namespace, name))
        return {"jwk": Secret(b"from the cluster")}

    file = tmp_path / "key"
    file.write_bytes(b"from a file")
    assert (await CredentialReader().read(FileSource(str(file)))).reveal() == b"from a file"
    in_cluster = SecretSource("certmount", "step", "jwk")
    assert (await CredentialReader(read_secret).read(in_cluster)).reveal() == b"from the cluster"
    assert requested == [("certmount", "step")]
    with pytest.raises(CertmountError, match="cannot be read outside a cluster; store it in a file"):
        await CredentialReader().read(in_cluster)
    file.write_bytes(b"")
    with pytest.raises(CertmountError, match="is empty"):
        await CredentialReader().read(FileSource(str(file)))
    with pytest.raises(CertmountError, match="cannot be read: Is a directory"):
        await CredentialReader().read(FileSource(str(tmp_path)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CertmountError, match="cannot be read: is not a regular file"):
        await CredentialReader().read(FileSource(str(tmp_path / "pipe")))


PAGE = (DOCS / "kubernetes-csr.md").read_text()


def blocks() -> Iterator[Any]:
    for block in PAGE.split("```yaml\n")[1:]:
        yield from yaml.safe_load_all(block.split("```")[0])


def test_example_issuers_are_valid_and_the_role_allows_their_signer() -> None:
    (text,) = [yaml.safe_dump(block) for block in blocks() if "issuers" in block]
    (declared,) = read_issuers(text.encode())
    assert isinstance(declared.configuration, KubernetesCSRConfiguration)
    (role,) = [block for block in blocks() if block.get("kind") == "ClusterRole"]
    named = [name for rule in role["rules"] for name in rule.get("resourceNames", ())]
    assert named == [declared.configuration.signer]


def test_table_lists_all_keys() -> None:
    rows = PAGE.split("| key | meaning |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in rows.splitlines()[2:]))) == {
        field.name for field in fields(KubernetesCSRConfiguration)
    }


def test_table_lists_existing_reasons() -> None:
    rows = PAGE.split("| checked | reason |")[1].split("\n\n")[0].splitlines()[2:]
    reasons = {word for row in rows for word in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert reasons <= set(REASONS)
    assert {"InvalidCSR", "TokenRejected", "ServiceAccountDenied", "NameNotAllowed", "TooManyRequests"} == reasons


def test_page_names_the_signer_and_the_lease() -> None:
    assert CERTMOUNT_SIGNER in PAGE
    assert SIGNER_LEASE in PAGE
