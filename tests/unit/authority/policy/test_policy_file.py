"""The policy file: parsing, faults and reloads."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from csi_driver.authority.policy import policy_file
from csi_driver.authority.policy.policy_file import PolicyFile, read_policy
from csi_driver.core.errors import CertmountError
from csi_driver.core.policy.engine import Policy
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import until

DOMAINS: dict[str, Any] = {"trust_domain": "cluster.local", "cluster_domain": "cluster.local"}
RULE = """
policy:
- match: {{namespaces: [{}], serviceAccounts: ["*"]}}
  allow: {{dns: ["*.example.com"]}}
"""


def read(text: str | bytes) -> Policy:
    return read_policy(text if isinstance(text, bytes) else text.encode(), **DOMAINS)


def namespaces(policy: Policy) -> list[str]:
    return [name for rule in policy.rules for name in rule.match.namespaces]


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "policy:\n", "policy: []\n", "---\n"])
def test_empty_file_contains_the_default_policy(text: str) -> None:
    assert read(text).rules == ()


@pytest.mark.parametrize(
    "content,words",
    [
        ("policy: []\npolicy: []\n", "line 2, column 1: the key 'policy' is duplicate"),
        ("policy:\n- match: {a: 1, a: 2}\n", "the key 'a' is duplicate"),
        ("policy:\n- {match: {}, ? [1]: 2}\n", "is not valid YAML in line 2"),
        ("policy: [\n}", "is not valid YAML in line 2, column 1"),
        ("a: &a [x]\nb: *a\n", "has an alias"),
        ("x: &x {a: 1}\npolicy: [{<<: *x}]\n", "has an alias"),
        (
            "policy: !!python/object/apply:os.system [id]\n",
            "is not valid YAML in line 1, column 9: could not determine",
        ),
        ("policy: !include other.yaml\n", "could not determine a constructor"),
        ("---\npolicy: []\n---\npolicy: []\n", "is not valid YAML"),
        (b"\xff\xfe", "is not UTF-8"),
        ("\x07", "is not valid YAML"),
        ("[" * 1_000_000, "is nested more than 20 levels deep"),
        ("{a: " * 200_000, "is nested more than 20 levels deep"),
        (" " * (1024 * 1024 + 1), "is longer than 1048576 bytes"),
        ("- " * 500_000, "is nested more than 20 levels deep"),
        ("just words", "policy file: is not a mapping"),
        ("polcy: []", "polcy (line 1): is unknown; did you mean policy?"),
        ("# rules\npolicy:\n- match: {namespaces: [a]}\n", "policy[0].match.serviceAccounts (line 3): is missing"),
        (
            "policy:\n- match: {}\n-\n  allow:\n    dns:\n    - a.b\n    - A\n",
            "policy[1].allow.dns[1] (line 7): 'A' has",
        ),
        ("policy:\n\n- match:\n    namespace: x\n", "policy[0].match.namespace (line 4): is unknown; did you mean"),
        ("deny:\n- match: {namespaces: [a], serviceAccounts: [b]}\n", "deny[0].reason (line 2): is missing"),
    ],
)
def test_invalid_policy_is_rejected_with_line_and_fault(content: str | bytes, words: str) -> None:
    with pytest.raises(CertmountError, match=f"InvalidPolicy: .*{re.escape(words)}"):
        read(content)


def test_aliases_cannot_exhaust_memory() -> None:
    lines = (f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi"))
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(lines)
    started = time.process_time()
    with pytest.raises(CertmountError, match="has an alias"):
        read(bomb)
    assert time.process_time() - started < 5


def test_rule_labels_contain_line_numbers() -> None:
    text = "# ours\npolicy:\n# all\n- match: {namespaces: ['*'], serviceAccounts: ['*']}\n  allow: {}\n\n-\n  match:\n    namespaces: [a]\n    serviceAccounts: [b]\n  allow:\n    dns: [x.example]\n"
    assert [rule.label for rule in read(text).rules] == ["policy[0] (line 4)", "policy[1] (line 8)"]


class Volume:
    """A ConfigMap volume as the kubelet writes it: files are links through ..data, which the kubelet replaces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.generation = 0
        folder.mkdir()
        self.file = folder / "policy.yaml"
        self.file.symlink_to("..data/policy.yaml")

    def write(self, text: str) -> None:
        self.generation += 1
        new = self.folder / f"..{self.generation}"
        new.mkdir()
        (new / "policy.yaml").write_text(text)
        link = self.folder / "..data_tmp"
        link.symlink_to(new.name)
        link.replace(self.folder / "..data")
        shutil.rmtree(self.folder / f"..{self.generation - 1}", ignore_errors=True)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "policy")


@pytest.fixture
def policy(volume: Volume, metrics: AuthorityMetrics) -> PolicyFile:
    return PolicyFile(volume.file, metrics, **DOMAINS)


async def test_missing_file_fails_the_start(policy: PolicyFile) -> None:
    with pytest.raises(CertmountError, match=r"policy\.yaml: cannot be read: No such file or directory; see --policy"):
        await policy.load()
    assert not policy.loaded
    with pytest.raises(CertmountError, match="not loaded yet") as failure:
        _ = policy.current
    assert failure.value.retryable


async def test_on_change_gets_the_revision_of_each_new_policy(volume: Volume, metrics: AuthorityMetrics) -> None:
    revisions: list[str] = []
    file = PolicyFile(volume.file, metrics, **DOMAINS, on_change=revisions.append)
    for text in (RULE.format("web"), RULE.format("web"), "policy: 7", RULE.format("shop"), RULE.format("web")):
        volume.write(text)
        with contextlib.suppress(CertmountError):
            await file.load()
    web, shop = (hashlib.sha256(RULE.format(name).encode()).hexdigest()[:16] for name in ("web", "shop"))
    assert (revisions, file.current.revision) == ([web, shop, web], web)


async def test_invalid_file_keeps_the_policy(volume: Volume, policy: PolicyFile, registry: CollectorRegistry) -> None:
    def valid() -> float | None:
        return registry.get_sample_value("certmount_policy_valid")

    volume.write(RULE.format("web"))
    await policy.load()
    assert valid() == 1
    volume.write("policy: [")
    with pytest.raises(CertmountError, match="is not valid YAML"):
        await policy.load()
    await policy.load()
    assert namespaces(policy.current) == ["web"]
    assert (valid(), registry.get_sample_value("certmount_policy_reload_failures_total")) == (0, 1)
    volume.write(RULE.format("web"))
    await policy.load()
    assert valid() == 1
    volume.file.unlink()
    with pytest.raises(CertmountError, match="cannot be read"):
        await policy.load()
    assert namespaces(policy.current) == ["web"]


async def test_changes_are_followed(volume: Volume, policy: PolicyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_file, "_CHECK_S", 0.005)
    volume.write(RULE.format("web"))
    await policy.load()
    with capture_logs() as logs:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(policy.run())
            volume.write("policy: 7")
            await until(lambda: any(entry["log_level"] == "error" for entry in logs), "the rejection")
            volume.write(RULE.format("shop"))
            await until(lambda: namespaces(policy.current) == ["shop"], "the new policy")
            task.cancel()
    (rejection,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert "policy (line 1): is not a list" in rejection["error"]
