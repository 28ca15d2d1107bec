"""The issuers' file: what is taken from it, that its schema says the same, and that a bad one never replaces a good one."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers import registry as issuers_file
from csi_driver.authority.issuers.kinds import ISSUER_KINDS, IssuerDependencies, IssuerKind, read_issuers
from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.issuers.registry import IssuersFile
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.core.config.document_reader import DocumentReader
from csi_driver.core.config.document_reader import Path as Place
from csi_driver.core.config.issuers import FileSource, SecretSource
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from tests.support.json_schema import valid
from tests.support.waiting import until

ROOT = Path(__file__).parents[4]
SHA256 = "ab" * 32
AWAY = object()
GOOD: dict[str, Any] = {
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


def refusal(document: object) -> CertmountError:
    with pytest.raises(CertmountError) as raised:
        read_issuers(yaml.safe_dump(document).encode())
    assert raised.value.reason is Reason.INVALID_ISSUERS
    return raised.value


def test_a_good_file_becomes_values() -> None:
    """Fingerprints and addresses in their one form; credentials as references."""
    step, other = read_issuers(yaml.safe_dump(GOOD).encode())
    assert (step.name, step.kind) == ("step", "step_ca")
    assert step.configuration == StepCAConfiguration(
        url="https://ca.example.com:9000",
        provisioner="csi",
        root_sha256=SHA256,
        key=SecretSource("certmount", "step-provisioner", "jwk"),
        password=FileSource("/etc/certmount/password"),
    )
    assert isinstance(other.configuration, StepCAConfiguration)
    assert (other.configuration.url, other.configuration.root_file) == ("https://[fd00::1]", "/etc/root.crt")


@pytest.mark.parametrize("text", ["", "# none yet\n", "issuers:\n", "issuers: []\n"])
def test_an_empty_file_declares_none(text: str) -> None:
    """The internal CA needs no entry."""
    assert read_issuers(text.encode()) == ()


def test_all_that_is_wrong_is_said_at_once_with_its_line() -> None:
    """So that one look at the log is enough."""
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
    with pytest.raises(CertmountError) as raised:
        read_issuers(text.encode())
    faults = [str(fault) for fault in raised.value.faults]
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
    said = "\n".join(faults)
    assert "'step' is the name of issuers[1] (line 5) already" in said
    assert "did you mean step_ca?" in said
    assert "put it in quotes" in said
    assert "hunter2" not in said, "what was meant to be secret is not told to the log"


def places(value: object, path: Place = ()) -> Iterator[Place]:
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


def changed(path: Place, change: Any) -> dict[str, Any]:
    """The good file with one part replaced, or taken away."""
    document: dict[str, Any] = copy.deepcopy(GOOD)
    part: Any = document
    for step in path[:-1]:
        part = part[step]
    if change is AWAY:
        del part[path[-1]]
    else:
        part[path[-1]] = change
    return document


CHANGES: list[Any] = [
    AWAY,
    None,
    "",
    "x",
    "/",
    "A b",
    5,
    [],
    [1],
    {},
    {"unknown": "x"},
    {"file": "/x"},
    {"file": "x"},
    True,
]


@pytest.mark.parametrize("path", [path for path in places(GOOD) if path], ids=str)
def test_the_schema_says_what_the_program_does(path: Place) -> None:
    """Each part of a good file replaced by something else, taken away, or with a stranger beside it: both agree."""
    schema = json.loads((ROOT / "docs" / "issuers.schema.json").read_text())
    assert valid(schema, GOOD)
    documents = [changed(path, change) for change in CHANGES]
    documents += [changed((*path[:-1], "stranger"), "x")] if isinstance(path[-1], str) else []
    for document in documents:
        try:
            read_issuers(yaml.safe_dump(document).encode())
            taken = True
        except CertmountError:
            taken = False
        assert taken == valid(schema, document), document


def test_the_schema_knows_every_kind() -> None:
    """An editor that checks by the schema offers what the program has."""
    schema = json.loads((ROOT / "docs" / "issuers.schema.json").read_text())
    entry = schema["properties"]["issuers"]["items"]
    assert set(entry["properties"]) == {"name", *ISSUER_KINDS}
    assert [{"required": [kind]} for kind in ISSUER_KINDS] == entry["oneOf"]


def test_every_kind_is_in_the_documents() -> None:
    """docs/issuers.md lists what the file may declare."""
    page = (ROOT / "docs" / "issuers.md").read_text()
    rows = page.split("| kind | signs |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", rows, flags=re.MULTILINE) == list(ISSUER_KINDS)


def test_every_yaml_example_in_the_documents_is_taken() -> None:
    """What a reader copies works."""
    for name in ("issuers.md", "from-autocert.md"):
        for block in (ROOT / "docs" / name).read_text().split("```yaml\n")[1:]:
            example = block.split("```")[0]
            if example.lstrip().startswith("issuers:"):
                assert read_issuers(example.encode()), example


class FakeIssuer:
    """Has what it is given, and counts its lives."""

    shares_certificates = False
    problem: str | None = None

    def __init__(self, name: str, configuration: object) -> None:
        self.name = name
        self.configuration = configuration
        self.roots: tuple[bytes, ...] = ()
        self.running = 0

    async def run(self) -> None:
        self.running += 1
        try:
            if self.configuration == "defect":
                raise RuntimeError("a defect")
            await asyncio.Event().wait()
        finally:
            self.running -= 1

    async def check(self) -> list[Finding]:
        return []

    async def issue(self, order: IssuerRequest) -> IssuedCertificate:
        raise NotImplementedError


def parse_fake(reader: DocumentReader, path: Place, value: object) -> object:
    if value == "wrong":
        reader.fault(path, "is wrong")
    return value


@dataclass
class Office:
    """An issuers' file, and what is heard of it."""

    file: Path
    roots: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    loads: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        fake = IssuerKind(parse_fake, lambda name, configuration, _: FakeIssuer(name, configuration))
        self.internal = FakeIssuer("internal", None)
        self.issuers = IssuersFile(
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
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Office:
    monkeypatch.setattr(issuers_file, "_CHECK_S", 0.01)
    return Office(tmp_path / "issuers.yaml")


async def test_issuers_come_go_and_stay(office: Office) -> None:
    """Who is not changed keeps its connections; who is gone stops, and what its pods trust is left alone."""
    office.write(a="1", b="1")
    async with office.running():
        a, b = office["a"], office["b"]
        await until(lambda: a.running == b.running == 1, "their work")
        a.roots = b.roots = (b"root",)
        await until(lambda: set(office.roots) == {"a", "b"}, "their roots")
        office.write(b="1", c="1")
        await until(lambda: "c" in office.issuers, "the new file")
        await until(lambda: a.running == 0 and office["c"].running == 1, "the change")
        assert office["b"] is b
        assert b.running == 1
        assert list(office.issuers) == ["internal", "b", "c"]
        assert office.issuers.get("a") is None
        assert office.roots["a"] == (b"root",)
        office.write(b="2", c="1")
        await until(lambda: office["b"] is not b, "the changed entry")
    assert b.running == office["c"].running == 0
    assert office.issuers["internal"] is office.internal


async def test_a_bad_file_keeps_what_there_is(office: Office) -> None:
    """It is said once, counted once, and over as soon as the file is good again."""
    office.write(a="1")
    async with office.running():
        with capture_logs() as logs:
            office.write(a="wrong", b="1")
            await until(lambda: office.loads == [True, False], "the bad file")
            assert list(office.issuers) == ["internal", "a"]
            office.file.unlink()
            await until(lambda: office.loads == [True, False, False], "the missing file")
            office.write(b="1")
            await until(lambda: "b" in office.issuers, "the good file")
    refused = [entry for entry in logs if entry["event"] == "issuers file rejected; the previous issuers file stays in force"]
    assert [entry["error"].partition(": ")[2] for entry in refused] == [
        "issuers[0].fake (line 2): is wrong",
        f"{office.file}: cannot be read: No such file or directory; see --issuers",
    ]


async def test_a_bad_file_at_the_start_is_refused(office: Office) -> None:
    """An authority does not begin with half of what its administrator meant."""
    office.write(a="wrong")
    with pytest.raises(CertmountError, match="is wrong"):
        await office.issuers.load()


async def test_a_defect_of_one_issuer_is_its_own(office: Office) -> None:
    """The others go on, and it is logged."""
    office.write(a="defect", b="1")
    with capture_logs() as logs:
        async with office.running():
            await until(lambda: office["b"].running == 1, "the other one")
            await until(lambda: logs, "the log")
            assert office["b"].running == 1
    assert any(entry["event"] == "the background work of an issuer failed" for entry in logs)


async def test_without_a_file_there_is_the_internal_ca() -> None:
    """As before there was such a file."""
    internal = FakeIssuer("internal", None)
    issuers = IssuersFile(
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


async def test_credentials_are_read_from_where_they_are(tmp_path: Path) -> None:
    """From files and Secrets; what is not there is told by its place, without a word of its content."""
    asked: list[tuple[str, str, str]] = []

    async def read_secret(namespace: str, name: str, key: str) -> Secret[bytes]:
        asked.append((namespace, name, key))
        return Secret(b"from the cluster")

    file = tmp_path / "key"
    file.write_bytes(b"from a file")
    assert (await CredentialReader().read(FileSource(str(file)))).reveal() == b"from a file"
    in_cluster = SecretSource("certmount", "step", "jwk")
    assert (await CredentialReader(read_secret).read(in_cluster)).reveal() == b"from the cluster"
    assert asked == [("certmount", "step", "jwk")]
    with pytest.raises(CertmountError, match="there is no cluster to read it from; keep it in a file"):
        await CredentialReader().read(in_cluster)
    file.write_bytes(b"")
    with pytest.raises(CertmountError, match="is empty"):
        await CredentialReader().read(FileSource(str(file)))
    with pytest.raises(CertmountError, match="cannot be read: Is a directory"):
        await CredentialReader().read(FileSource(str(tmp_path)))
